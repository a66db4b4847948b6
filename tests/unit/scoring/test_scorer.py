"""Scores from hooked hidden states against the model's own logits in fp64, over architectures and wrappings."""

import copy

import pytest
import torch
import transformers
from support.sampling import naive_kept, vllm_kept
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

from trl_parity.errors import InterceptionError
from trl_parity.records import SamplingSettings
from trl_parity.scoring.model_head import causal_lm
from trl_parity.scoring.scorer import CompletionScorer

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}
GQA = SIZE | {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}

ARCHITECTURES = {
    "qwen3-untied": ("Qwen3", GQA | {"tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3", GQA | {"tie_word_embeddings": True}),
    "llama": ("Llama", GQA),
    "gpt2-learned-positions": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 61, "n_positions": 64}),
    "opt": ("OPT", SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64}),
    "phi-head-bias": ("Phi", SIZE | {"max_position_embeddings": 64}),
    "gemma2-softcap": ("Gemma2", GQA | {"final_logit_softcapping": 3.0}),
    "granite-logits-scaling": ("Granite", GQA | {"logits_scaling": 4.0}),
    "cohere-logit-scale": ("Cohere", GQA | {"logit_scale": 0.25}),
    "llama4-its-own-base-model": ("Llama4Text", GQA | {"intermediate_size_mlp": 48, "num_local_experts": 2}),
}  # fmt: skip


def build(name):
    kind, config = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
        settings = getattr(transformers, f"{kind}Config")(**config, **tokens)
        model = transformers.AutoModelForCausalLM.from_config(settings)
        for parameter in model.parameters():  # larger than the default init: logits must spread
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(keep=7, seed=0):
    """Left-padded prompts, right-padded completions; the last row is fully masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 61, (5, 6 + keep), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, 9:] = 0
    mask[4, 6:] = 0
    return ids, mask


def oracle(model, ids, mask, keep, temperature):
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = exact(input_ids=ids, attention_mask=mask).logits[:, -(keep + 1) : -1] / temperature
    law = logits.log_softmax(-1)
    return law.gather(-1, ids[:, -keep:].unsqueeze(-1)).squeeze(-1), -(law.exp() * law).sum(-1), logits


def score(model, ids, mask, keep, temperature=0.7, sampling=None, chunk=1 << 20, splits=(2, 3)):
    scorer = CompletionScorer(
        model,
        keep,
        temperature=temperature,
        sampling=sampling or SamplingSettings(),
        replay_sampling=sampling is not None,
        chunk_bytes=chunk,
    )
    # the call GRPOTrainer makes, mini-batch by mini-batch (its fused head can't take a head without a bias attribute,
    # nor a model that is its own base model)
    lm = causal_lm(model)
    fused = hasattr(lm.get_output_embeddings(), "bias") and lm.base_model is not lm
    add_fused_lm_head(causal_lm(model), temperature=temperature)
    with scorer, torch.no_grad():
        for part_ids, part_mask in zip(ids.split(splits), mask.split(splits), strict=True):
            model(
                input_ids=part_ids,
                attention_mask=part_mask,
                **({"labels": part_ids, "fused_lm_head": True} if fused else {}),
            )
    return scorer.scores()


def assert_scores(model, keep=7, temperature=0.7):
    ids, mask = batch(keep)
    logprobs, entropy, _ = oracle(model, ids, mask, keep, temperature)
    scores = score(model, ids, mask, keep, temperature)
    real = mask[:, -keep:].bool()
    # the backbone runs in fp32 here and in fp64 in the oracle: its rounding is most of what is left
    # (some of PEFT's adapters compute in fp32 whatever they are given)
    torch.testing.assert_close(scores.logprobs.double()[real], logprobs.double()[real], atol=5e-5, rtol=0)
    torch.testing.assert_close(scores.entropy.double()[real], entropy.double()[real], atol=5e-5, rtol=0)
    assert (scores.logprobs[~real] == 0).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_equal_the_models_own_logits(name):
    assert_scores(build(name))


def lora(model, **config):
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.5, **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    return wrapped.eval()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["attention", "lm_head", "modules_to_save"],
)
def test_peft_adapters_count_as_in_training(config):
    assert_scores(lora(build("qwen3-untied"), **config))


def on_the_head(kind):
    """A PEFT configuration that puts adapters of some kind on the head."""
    import peft

    head = {"target_modules": ["q_proj", "lm_head"]}
    return {
        "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **head),
        "lora_bias": lambda: peft.LoraConfig(r=4, lora_bias=True, **head),
        "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, **head),
        "vera": lambda: peft.VeraConfig(r=4, target_modules=["lm_head"]),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, **head),
        "ia3": lambda: peft.IA3Config(feedforward_modules=["q_proj"], **head),
        "ia3 on what goes in": lambda: peft.IA3Config(feedforward_modules=["lm_head"], **head),
        "loha": lambda: peft.LoHaConfig(r=4, **head),
        "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=4, total_step=9, **head),
        "trainable tokens": lambda: peft.LoraConfig(
            r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 20]}
        ),
    }[kind]()


ON_THE_HEAD = (
    "dora", "lora_bias", "rslora", "vera", "oft", "ia3", "ia3 on what goes in", "loha", "adalora", "trainable tokens"
)  # fmt: skip


@pytest.mark.parametrize("kind", ON_THE_HEAD)
def test_a_head_that_is_more_than_a_matrix_is_scored_as_it_is(kind):
    import peft

    model = build("phi-head-bias" if kind == "lora_bias" else "qwen3-untied")
    wrapped = peft.get_peft_model(model, on_the_head(kind)).eval()
    assert_scores(wrapped)
    base = copy.deepcopy(score(wrapped, *batch(), 7))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    assert_scores(wrapped)
    assert (score(wrapped, *batch(), 7).logprobs - base.logprobs).abs().max() > 0.01


def test_a_head_of_bf16_that_is_more_than_a_matrix_makes_its_products_in_fp32():
    import peft

    model = peft.get_peft_model(build("qwen3-untied").bfloat16(), on_the_head("dora")).eval()
    ids, mask = batch()
    before = torch.random.get_rng_state()
    scores = score(model.train(), ids, mask, 7)
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.no_grad():
        hidden = model.get_base_model().base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -8:-1]
        logits = copy.deepcopy(model.get_output_embeddings()).float()(hidden.float()) / 0.7
    exact = logits.log_softmax(-1).gather(-1, ids[:, -7:].unsqueeze(-1)).squeeze(-1)
    real = mask[:, -7:].bool()
    torch.testing.assert_close(scores.logprobs[real], exact[real], atol=1e-5, rtol=0)


def test_a_head_that_can_not_be_had_in_fp32_is_refused():
    from trl_parity.errors import InterceptionError

    class Stubborn(torch.nn.Linear):
        def forward(self, hidden):
            raise RuntimeError("no fp32 here")

    model = build("qwen3-untied")
    model.lm_head.__class__ = Stubborn
    scorer = CompletionScorer(
        model, 7, temperature=1.0, sampling=SamplingSettings(), replay_sampling=False, chunk_bytes=1 << 20
    )
    ids, mask = batch()
    with scorer, torch.no_grad():
        model.base_model(input_ids=ids, attention_mask=mask)
    with pytest.raises(InterceptionError, match=r"Stubborn.*no fp32 here.*Leave lm_head out"):
        scorer.scores()


def test_disabled_adapters_do_not_count():
    model = lora(build("qwen3-untied"), target_modules=["q_proj", "lm_head"])
    ids, mask = batch()
    with model.disable_adapter():
        logprobs, _, _ = oracle(model.get_base_model(), ids, mask, 7, 0.7)
        scores = score(model, ids, mask, 7)
    real = mask[:, -7:].bool()
    torch.testing.assert_close(scores.logprobs.double()[real], logprobs[real], atol=5e-5, rtol=0)


def test_padding_rows_of_the_head_are_left_out():
    model = build("qwen3-untied")
    plain = score(model, *batch(), 7)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.cat([head.weight, torch.full((3, 32), 9.0)]))
    torch.testing.assert_close(score(model, *batch(), 7).logprobs, plain.logprobs)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(top_p=0.8),
        SamplingSettings(top_k=7, min_p=0.01),
        SamplingSettings(repetition_penalty=1.4),
        SamplingSettings(presence_penalty=0.8, frequency_penalty=0.5, top_p=0.9),
    ],
)
@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(1 << 12, id="token-by-token", marks=pytest.mark.slow_unit),
        pytest.param(1 << 22, id="all-at-once"),
    ],
)
@pytest.mark.parametrize(
    "few",
    [
        pytest.param((2, 4), id="too-few", marks=pytest.mark.slow_unit),
        pytest.param((2, 90), id="some-too-few"),
        pytest.param((64, 1024), id="enough"),
    ],
)
def test_replayed_sampling_equals_a_loop_over_tokens(sampling, chunk, few, monkeypatch):
    """Token by token, in fp64, with python lists: penalties on the context, then the truncation by hand and vLLM's."""
    by_vllm = chunk == 1 << 12 or few == (2, 4)
    for name, n in zip(("_FEW", "_MANY"), few, strict=True):
        monkeypatch.setattr(f"trl_parity.scoring.sampling.{name}", n)

    model, keep, temperature = build("qwen3-untied"), 7, 0.7
    ids, mask = batch(keep)
    _, _, scaled = oracle(model, ids, mask, keep, temperature)
    scores = score(model, ids, mask, keep, temperature, sampling, chunk)
    for b in range(len(ids)):
        for t in range(keep):
            column = ids.shape[1] - keep + t
            if not mask[b, column]:
                continue
            z = scaled[b, t] * temperature
            prompt = [int(x) for x, m in zip(ids[b, :6], mask[b, :6], strict=True) if m]
            output = ids[b, 6:column].tolist()
            for token in set(prompt + output):
                z[token] = (
                    z[token] / sampling.repetition_penalty if z[token] > 0 else z[token] * sampling.repetition_penalty
                )
            for token in set(output):
                z[token] -= sampling.frequency_penalty * output.count(token) + sampling.presence_penalty
            z = (z / temperature).float()
            kept = torch.zeros(len(z), dtype=torch.bool)
            kept[naive_kept(z.tolist(), sampling.top_k, sampling.top_p, sampling.min_p)] = True
            if by_vllm:
                assert torch.equal(kept, vllm_kept(z.unsqueeze(0), sampling)[0])
            kept[ids[b, column]] = True
            expected = z.masked_fill(~kept, -torch.inf).log_softmax(-1)[ids[b, column]]
            assert float(scores.logprobs[b, t]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [SamplingSettings(repetition_penalty=1.4), SamplingSettings(presence_penalty=0.8, frequency_penalty=0.5)],
)
def test_penalties_count_what_the_request_at_hand_sampled(sampling):
    """Two turns with a tool between them: to the second request, the first turn is prompt."""
    model, keep = build("qwen3-untied"), 7
    ids, mask = batch(keep)
    ids[:, -keep:] = ids[:, -keep:] % 5 + 2  # tokens that come again
    engine_mask = mask[:, -keep:].bool()
    engine_mask[:, 3] = False
    engine_mask[1, 1:3] = False
    _, _, scaled = oracle(model, ids, mask, keep, 0.7)
    scorer = CompletionScorer(
        model, keep, temperature=0.7, sampling=sampling, replay_sampling=True, chunk_bytes=1 << 12
    )
    scorer.engine_mask = engine_mask
    with scorer, torch.no_grad():
        for rows in ((0, 2), (2, 5)):
            model(input_ids=ids[slice(*rows)], attention_mask=mask[slice(*rows)])
    scores = scorer.scores()
    for b, t in engine_mask.nonzero().tolist():
        z = scaled[b, t] * 0.7
        column = ids.shape[1] - keep + t
        first = max((i + 1 for i in range(t) if not engine_mask[b, i]), default=0)
        output = ids[b, column - t + first : column].tolist()
        for token in {int(x) for x, m in zip(ids[b, :column], mask[b, :column], strict=True) if m}:
            z[token] *= 1 / sampling.repetition_penalty if z[token] > 0 else sampling.repetition_penalty
        for token in set(output):
            z[token] -= sampling.frequency_penalty * output.count(token) + sampling.presence_penalty
        expected = (z / 0.7).log_softmax(-1)[ids[b, column]]
        assert float(scores.logprobs[b, t]) == pytest.approx(float(expected), abs=1e-4)


def test_no_row_of_logits_is_sorted_where_the_most_likely_tokens_suffice(monkeypatch):
    def replay(*args):
        raise AssertionError("whole rows of logits")

    monkeypatch.setattr("trl_parity.scoring.scorer.replay", replay)
    model, (ids, mask) = build("qwen3-untied"), batch(7)
    for sampling in (SamplingSettings(top_p=0.8), SamplingSettings(top_k=7), SamplingSettings(min_p=0.1)):
        plain, replayed = (score(model, ids, mask, 7, sampling=s) for s in (None, sampling))
        assert torch.equal(plain.entropy, replayed.entropy)
        assert (replayed.log_kept < 0).any()


def test_a_failure_inside_the_hook_does_not_reach_the_forward():
    model = build("llama")
    scorer = CompletionScorer(
        model, 7, temperature=0.0, sampling=SamplingSettings(), replay_sampling=False, chunk_bytes=1 << 20
    )
    ids, mask = batch()
    with scorer, torch.no_grad():
        assert model(input_ids=ids, attention_mask=mask).logits.shape[0] == 5  # the run's own forward is unharmed
    with pytest.raises(ValueError, match="temperature"):
        scorer.scores()


def test_a_model_without_a_backbone_is_refused_by_name():
    model = build("llama4-its-own-base-model")
    model.model = torch.nn.Identity()
    scorer = CompletionScorer(
        model, 7, temperature=1.0, sampling=SamplingSettings(), replay_sampling=False, chunk_bytes=1 << 20
    )
    with pytest.raises(
        InterceptionError, match=r"Llama4ForCausalLM has no model inside.*'language_model'.*model, lm_head"
    ):
        scorer.__enter__()


def test_no_forward_is_said_not_passed_over():
    model = build("llama")
    scorer = CompletionScorer(
        model, 7, temperature=1.0, sampling=SamplingSettings(), replay_sampling=False, chunk_bytes=1 << 20
    )
    with scorer:
        pass
    with pytest.raises(RuntimeError, match="never ran"):
        scorer.scores()


def test_the_hook_is_gone_afterwards():
    model = build("llama")
    score(model, *batch(), 7)
    assert not model.base_model._forward_hooks


def test_bf16_model_is_scored_with_the_fp32_head():
    model = build("qwen3-untied").bfloat16()
    ids, mask = batch()
    scores = score(model, ids, mask, 7)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -8:-1]
    logits = hidden.double() @ model.get_output_embeddings().weight.double().T / 0.7
    exact = logits.log_softmax(-1).gather(-1, ids[:, -7:].unsqueeze(-1)).squeeze(-1)
    real = mask[:, -7:].bool()
    torch.testing.assert_close(scores.logprobs.double()[real], exact[real], atol=1e-5, rtol=0)


def test_one_wait_for_the_device_a_mini_batch():
    """What needs an answer from an accelerator: where the tokens are. The check of the targets is the CPU's alone."""
    waits = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name()
            if name in ("aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::is_nonzero"):
                waits.append(name)
            return func(*args, **(kwargs or {}))

    model = build("qwen3-tied")
    ids, mask = batch()
    with Waits(), torch.no_grad():
        for rows in ((0, 2), (2, 5)):
            model(input_ids=ids[slice(*rows)], attention_mask=mask[slice(*rows)], logits_to_keep=8)
    own = waits.copy()
    waits.clear()
    with Waits():
        score(model, ids, mask, 7, splits=(2, 3))
    assert waits.count("aten::nonzero") - own.count("aten::nonzero") == 2
    # smallest and largest target of each mini-batch
    assert waits.count("aten::_local_scalar_dense") - own.count("aten::_local_scalar_dense") == 2 * 2
    assert set(waits) <= {"aten::nonzero", "aten::_local_scalar_dense"}
    waits.clear()
    with Waits():
        score(model, ids, mask, 7, splits=(2, 3), sampling=SamplingSettings(top_p=0.8))
    # and for which tokens the most likely ones are too few
    assert waits.count("aten::nonzero") - own.count("aten::nonzero") == 2 * 2
