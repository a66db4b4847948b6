"""The noise floor: what rounding noise is, that it leaves the run alone, and when it is measured anew."""

import copy

import pytest
import torch
from support.models import save_tiny_model

from trl_parity.scoring.perturb import eval_mode, rounding_noise


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
