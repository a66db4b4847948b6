"""The noise floor: what rounding noise is, that it leaves the run alone, and when it is measured anew."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from support import save_tiny_model

from trl_parity import ParityConfig
from trl_parity.judging.noise_floor import NoiseFloor
from trl_parity.live.floor_measurement import noise_dtype
from trl_parity.metrics.scalars import FLOORED
from trl_parity.metrics.statistics import measure
from trl_parity.metrics.sums import MismatchSums
from trl_parity.records import ScoredBatch
from trl_parity.scoring.perturb import eval_mode, rounding_noise
from trl_parity.trainers.capture import Capture


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tiny")), dtype=torch.float32)


IDS = torch.arange(2, 40).view(2, 19)


def hidden(model):
    with torch.no_grad():
        return model.base_model(input_ids=IDS).last_hidden_state.double()


def test_rounding_noise_leaves_weights_hooks_and_random_state_as_they_were(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, state = hidden(model), torch.get_rng_state()
    with rounding_noise(model.base_model, torch.bfloat16, seed=1):
        noisy = hidden(model)
    assert not torch.equal(noisy, plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(hidden(model), plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_rounding_noise_is_that_of_the_dtype_and_repeats_with_its_seed(model):
    def size(dtype, seed=1):
        with rounding_noise(model.base_model, dtype, seed):
            return float((hidden(model) - plain).pow(2).mean().sqrt())

    plain = hidden(model)
    assert size(torch.bfloat16) == size(torch.bfloat16) != size(torch.bfloat16, seed=2)
    # three more bits: an eighth of the error; fp32 has 16 more
    assert size(torch.bfloat16) / size(torch.float16) == pytest.approx(8, rel=0.3)
    assert size(torch.bfloat16) / size(torch.float32) > 2**14


def architecture(name):
    import transformers as t

    common = {"vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64}
    gated = common | {"intermediate_size": 128}
    gpt2 = {"vocab_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 64}
    opt = common | {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64}
    gemma = gated | {"num_key_value_heads": 2, "head_dim": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "gpt2":  # learned positions, Conv1D layers
            return t.GPT2LMHeadModel(t.GPT2Config(**gpt2))
        if name == "opt":
            return t.OPTForCausalLM(t.OPTConfig(**opt))
        if name == "gemma2":
            return t.Gemma2ForCausalLM(t.Gemma2Config(**gemma))
        return t.LlamaForCausalLM(t.LlamaConfig(**gated))


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "opt", "gemma2"])
def test_rounding_noise_is_about_what_a_real_bf16_model_differs_by(model, name):
    """Not an exact law, but the size must fit: it is the yardstick of every rule."""
    real = copy.deepcopy(model if name == "qwen3" else architecture(name)).eval().to(torch.bfloat16)
    twin = copy.deepcopy(real).float()  # the same, already rounded weights in fp32 arithmetic
    plain = hidden(twin)
    with rounding_noise(twin.base_model, torch.bfloat16, seed=1):
        drawn = (hidden(twin) - plain).pow(2).mean().sqrt()
    assert 0.7 < float(drawn / (hidden(real) - plain).pow(2).mean().sqrt()) < 2.5


def test_weights_are_not_rounded_by_the_noise():
    """w = 1 + 2**-9 is no bf16 number: with rounded weights the slope would be 1, with rounded activations it is w."""
    layer = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    layer[0].weight.data.fill_(1 + 2**-9)
    x = torch.linspace(1, 2, 400_000)[:, None]
    with torch.no_grad(), rounding_noise(layer, torch.bfloat16, seed=0):
        noisy = layer[0](x)
    slope = float(noisy.double().sum() / x.double().sum())
    assert slope == pytest.approx(1 + 2**-9, abs=5e-4)


def test_eval_mode_puts_every_layer_back():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout())).train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    with eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize(
    ("engine", "mixed", "expected"),
    [
        (torch.bfloat16, "no", torch.bfloat16),
        (torch.float16, "bf16", torch.bfloat16),
        (torch.float32, "no", torch.float32),
        (torch.float32, "fp16", torch.float16),
    ],
)
def test_noise_has_the_coarser_dtype_of_both_sides(model, engine, mixed, expected):
    trainer = SimpleNamespace(accelerator=SimpleNamespace(mixed_precision=mixed))
    capture = SimpleNamespace(compute_dtype=Capture.compute_dtype.fget(SimpleNamespace(trainer=trainer, policy=model)))
    assert noise_dtype(engine, capture) == expected


# ---- the floor in force -----------------------------------------------------------------------------------------


def sums(scale, tokens=400):
    generator = torch.Generator().manual_seed(0)
    one = -torch.rand(4, tokens // 4, generator=generator)
    other = one + scale * torch.randn(4, tokens // 4, generator=generator)
    scored = ScoredBatch(
        mask=torch.ones_like(one, dtype=torch.bool), rollout_logprobs=one, trainer_logprobs=other,
        own_logprobs=other, entropy=None,
    )  # fmt: skip
    return measure(scored, bootstrap_samples=2)


def test_the_floor_is_the_largest_of_its_sources():
    floor = NoiseFloor(ParityConfig())
    assert floor.update({"rounding": sums(0.01), "batch_shape": sums(0.03), "engine": MismatchSums.zeros()})
    assert set(floor.sources) == {"rounding", "batch_shape"}
    assert floor.values["floor/kl_k3"] == floor.sources["batch_shape"]["kl_k3"] > floor.sources["rounding"]["kl_k3"]
    assert floor.values["floor/ess"] == floor.sources["batch_shape"]["ess"] < floor.sources["rounding"]["ess"]
    assert set(floor.values) == {f"floor/{stat}" for stat in FLOORED}


def test_a_measurement_without_tokens_leaves_the_floor_as_it_was():
    floor = NoiseFloor(ParityConfig(floor_every_n_windows=7))
    assert not floor.update({"rounding": MismatchSums.zeros(), "engine": sums(0.01)})
    assert floor.values == {}
    assert not floor.due  # tried in vain: not again at every window
    floor.age += 7
    assert floor.due
    floor.update({"rounding": sums(0.01)})
    before = dict(floor.values)
    assert not floor.update({"rounding": MismatchSums.zeros()})
    assert floor.values == before


def test_the_floor_is_measured_at_once_and_then_as_rarely_as_its_budget_says():
    floor = NoiseFloor(ParityConfig(floor_every_n_windows=10, floor_cost_share=0.01))
    assert floor.due
    floor.update({"rounding": sums(0.01)})
    floor.account(1.0, 2.0)  # a second of the first two
    measured = [0]
    for window in range(1, 1000):
        floor.age += 1
        if floor.due:
            measured.append(window)
            floor.update({"rounding": sums(0.01)})
            floor.account(1.0, 2.0)
        else:
            floor.account(0.0, 2.0)
    assert min(b - a for a, b in itertools.pairwise(measured)) >= 10
    assert floor.seconds <= 0.01 * floor.wall + 1.0
    assert len(measured) >= 10  # and it is not forgotten


def test_without_a_floor_there_is_no_excess():
    floor = NoiseFloor(ParityConfig(floor_tokens=0))
    assert not floor.due
    assert not any(name.startswith("excess/") for name in floor.scalars({"trimmed/kl_k3": 1.0}))
