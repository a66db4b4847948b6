"""Traps that come with a model or an adapter: each told where the real library does it, and mended by what is told."""

import copy
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhimoeConfig,
    Qwen2Config,
    XGLMConfig,
)

from trl_parity.lint.facts import configured_facts, facts
from trl_parity.lint.models import adapter_facts, model_facts, tied_adapter
from trl_parity.lint.rules import Facts, lint
from trl_parity.records import SamplingSettings
from trl_parity.trainers.grpo import GRPOCapture

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
IDS = torch.arange(3, 15)[None]


def findings(**facts):
    return list(lint(Facts(sampling=None, trainer_temperature=None, replayed=True, **facts)))


def model_of(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def log_probs(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)


def random_gap(model):
    """Between two passes of the trainer's kind."""
    model.train()
    one, other = (log_probs(model, IDS, torch.ones_like(IDS)) for _ in range(2))
    return (one - other).abs().max().item()


def padded_gap(model):
    model.eval()
    padding, mask = torch.zeros(1, 5, dtype=torch.long), torch.ones_like(IDS)
    padded = log_probs(model, torch.cat([padding, IDS], 1), torch.cat([padding, mask], 1))[:, 5:]
    return (padded - log_probs(model, IDS, mask)).abs().max().item()


# ---- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "trap"),
    [
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2), True),
        (XGLMConfig(vocab_size=64, d_model=32, ffn_dim=48, num_layers=2, attention_heads=2, layerdrop=0.0), True),
        (OPTConfig(vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
                   num_attention_heads=2), False),
        (LlamaConfig(**SMALL), False),
    ],
    ids=["gpt2", "xglm", "opt", "llama"],
)  # fmt: skip
def test_positions_counted_over_padding_are_told_and_mended(config, trap):
    model = model_of(config)
    found = findings(**model_facts(model.config))
    assert [f.cause for f in found] == ["model_definition"] * trap
    if not trap:
        assert padded_gap(model) < 1e-5
        return
    assert padded_gap(model) > 0.1
    told = found[0].fix
    exec(told[told.index("trainer.model") : told.index("; or")], {"trainer": SimpleNamespace(model=model)})
    assert padded_gap(model) < 1e-5


# ---- random in training mode ----------------------------------------------------------------------------------------


def test_experts_drawn_at_random_are_told_and_mended():
    model = model_of(PhimoeConfig(**SMALL, **EXPERTS, router_jitter_noise=0.5))
    (found,) = findings(**model_facts(model.config))
    assert (found.severity, found.cause) == ("error", "moe_routing")
    assert "phimoe draws at random in training mode (experts)" in found.text
    assert random_gap(model) > 0.1
    told = found.fix
    exec(told[told.index("for m") : -1], {"trainer": SimpleNamespace(model=model)})
    assert random_gap(model) == 0


@pytest.mark.parametrize(
    ("kind", "settings", "name", "cause"),
    [
        (MixtralConfig, SMALL | EXPERTS, "router_jitter_noise", "moe_routing"),
        (OPTConfig, {"vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0,
                     "num_hidden_layers": 4, "num_attention_heads": 2}, "layerdrop", "trainer_numerics"),
    ],
)  # fmt: skip
def test_noise_that_a_config_sets_is_told_and_mended(kind, settings, name, cause):
    config = kind(**settings, **{name: 0.5})
    (found,) = findings(**model_facts(config))
    assert (found.severity, found.cause) == ("error", cause)
    assert f"{name}=0.5" in found.text
    assert f"{name} = 0 in the model's config" in found.fix
    model = model_of(config)
    assert max(random_gap(model) for _ in range(8)) > 0.01  # few layers: two passes may skip the same ones
    assert findings(**model_facts(config, {name: 0.0})) == []
    assert random_gap(model_of(kind(**settings, **{name: 0.0}))) == 0


def test_no_other_causal_language_model_draws_its_experts_at_random():
    folder = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    drawing = set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        source = folder / kind / f"modeling_{kind}.py"
        if source.exists() and re.search(r"self\.training and .*(jitter|noise)|exponential_\(\)", source.read_text()):
            drawing.add(kind)
    assert drawing == {"dbrx", "minimax", "minimax_m2", "mixtral", "phimoe"}
    assert "ffn_config" in transformers.DbrxConfig().to_dict()
    config = transformers.DbrxConfig(ffn_config={"moe_jitter_eps": 0.1})
    assert model_facts(config)["draws"] == ("moe_jitter_eps=0.1",)
    assert model_facts(transformers.DbrxConfig())["draws"] == ()


# ---- adapters -------------------------------------------------------------------------------------------------------


def delivered(policy):
    """What TRL's VLLMGeneration hands to the engine."""
    policy.merge_adapter()
    tensors = {}
    for name, parameter in policy.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if policy.prefix not in name and "original_module" not in name:
            tensors[name.replace("modules_to_save.default.", "")] = parameter.data.clone()
    policy.unmerge_adapter()
    return tensors


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    ("settings", "once", "told"),
    [
        ({}, False, None),
        ({"modules_to_save": ["lm_head"]}, False, "modules_to_save"),
        ({"modules_to_save": ["embed_tokens"]}, False, "modules_to_save"),
        ({"modules_to_save": ["embed_tokens"]}, True, None),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False, "target_modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, False, "target_modules"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True, "target_modules"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_a_tied_embedding_is_told_where_the_engine_gets_another_model(settings, once, told, tied):
    config = Qwen2Config(**SMALL, tie_word_embeddings=tied)
    base = model_of(config)
    arguments = {"target_modules": ["q_proj"]} | settings
    values = {"use_peft": True} | {f"lora_{name}": list(value) for name, value in arguments.items()}
    policy = get_peft_model(copy.deepcopy(base), LoraConfig(**copy.deepcopy(arguments), ensure_weight_tying=once))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    engine = copy.deepcopy(base)
    engine.load_state_dict(delivered(policy), strict=False)
    gap = (log_probs(policy, IDS, torch.ones_like(IDS)) - log_probs(engine, IDS, torch.ones_like(IDS))).abs().max()
    told = told if tied else None
    found = findings(**adapter_facts(policy))
    if told is None:
        assert gap < 1e-4
        assert found == []
    else:
        assert gap > 0.05
        assert [(f.severity, f.cause) for f in found] == [("error", "partial_sync")]
        assert told in found[0].text + found[0].fix
    if not once:
        assert tied_adapter(values, tied) == told


def test_settings_that_name_no_embedding_are_no_trap():
    for targets in ("all-linear", ["q_proj", "v_proj"], r".*\.(q|v)_proj", None):
        assert tied_adapter({"use_peft": True, "lora_target_modules": targets}, tied=True) is None
    assert tied_adapter({"use_peft": True, "lora_target_modules": ".*(embed_tokens|q_proj)"}, True) == "target_modules"
    assert tied_adapter({"lora_modules_to_save": ["lm_head"]}, tied=True) is None  # no adapter at all
    with pytest.raises(ValueError, match="no pattern"):
        tied_adapter({"use_peft": True, "lora_target_modules": "*_proj"}, tied=True)


@pytest.mark.parametrize(("dtype", "moves"), [("bfloat16", True), ("float32", False)])
def test_merging_into_half_precision_is_told_where_it_moves_the_base(dtype, moves):
    policy = get_peft_model(model_of(LlamaConfig(**SMALL)).to(getattr(torch, dtype)), LoraConfig(r=4))
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    frozen = {n: p.clone() for n, p in policy.named_parameters() if "base_layer" in n}
    for _ in range(3):
        policy.merge_adapter()
        policy.unmerge_adapter()
    now = dict(policy.named_parameters())
    moved = max(((now[n] - before).norm() / before.norm()).item() for n, before in frozen.items())
    assert (moved > 1e-4) == moves
    found = findings(trainer_dtype=dtype, **adapter_facts(policy))
    assert [(f.severity, f.cause) for f in found] == [("warning", "reference_drift")] * moves
    assert findings(trainer_dtype=dtype, **adapter_facts(policy.get_base_model())) == []


# ---- a live run -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_live_policy_is_read_as_its_settings_are():
    policy = get_peft_model(model_of(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)).bfloat16(),
                            LoraConfig(target_modules=["c_attn", "wte"]))  # fmt: skip
    args = SimpleNamespace(
        vllm_importance_sampling_correction=True, vllm_importance_sampling_mode="sequence_mask", vllm_mode="colocate",
        max_completion_length=16, mask_truncated_completions=True,
    )  # fmt: skip
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, mixed_precision="no")
    generation = SimpleNamespace(mode="colocate", generation_kwargs={"seed": 3, "stop_token_ids": [1, 2]}, logprobs=0)
    trainer = SimpleNamespace(args=args, accelerator=accelerator, model=policy, temperature=1.0, eos_token_ids=[2],
                              vllm_generation=generation)  # fmt: skip
    capture = object.__new__(GRPOCapture)
    capture.trainer, capture.sampling = trainer, SamplingSettings(top_p=0.9)
    capture._observer = SimpleNamespace(engine_handle=SimpleNamespace(get=lambda generation: None))
    capture.requests = []
    f = facts(capture, replayed=True)
    assert (f.seed, f.group_requests, f.ends, f.masks_truncated) == (3, True, ("stop_token_ids=[1]",), True)
    assert (f.weighs_sequences, f.max_completion_length, f.refused) == ("sequence_mask", 16, None)
    assert (f.merges_adapter, f.tied_adapter, f.trainer_dtype) == (True, "target_modules", "bfloat16")
    assert (f.model_type, f.absolute_positions, f.draws) == ("gpt2", True, ())
    trainer._lora_sync = True  # adapters as adapters: nothing is merged
    assert not facts(capture, replayed=True).merges_adapter


# ---- names ----------------------------------------------------------------------------------------------------------


def test_architectures_whose_names_the_engine_refuses_are_told_before_a_run(tmp_path):
    def told(config, **values):
        config.save_pretrained(tmp_path)
        read = configured_facts({"model_name_or_path": str(tmp_path), "use_vllm": True} | values)
        return [f.text for f in lint(read) if f.cause == "partial_sync"]

    (text,) = told(MixtralConfig(**SMALL, architectures=["MixtralForCausalLM"]))
    assert "MixtralForCausalLM doesn't know its experts" in text
    assert told(MixtralConfig(**SMALL, architectures=["MixtralForCausalLM"]), vllm_model_impl="transformers") == []
    neox = {"hidden_size": 32, "num_attention_heads": 2, "architectures": ["GPTNeoXForCausalLM"]}
    assert len(told(transformers.GPTNeoXConfig(**neox, tie_word_embeddings=False))) == 1
    assert told(transformers.GPTNeoXConfig(**neox, tie_word_embeddings=True)) == []
    assert told(LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])) == []
    server = {"vllm_mode": "server"}
    assert told(MixtralConfig(**SMALL, architectures=["MixtralForCausalLM"]), **server) == []  # not known
    for line, count in (("vllm serve x", 1), ("vllm serve x --model-impl transformers", 0)):
        read = configured_facts({"model_name_or_path": str(tmp_path), **server}, serve=line)
        assert sum(f.cause == "partial_sync" for f in lint(read)) == count
