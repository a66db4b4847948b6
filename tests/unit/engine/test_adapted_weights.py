"""The policy's weights under every kind of adapter, against PEFT's own merge of the whole model."""

import copy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl_parity.engine.weight_readback import lora_tensors, policy_tensors
from trl_parity.scoring.perturb import swapped, without_adapters

LINEAR = ["q_proj", "down_proj"]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=LINEAR),
    "rslora": lambda: peft.LoraConfig(r=4, target_modules=LINEAR, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
    "bias": lambda: peft.LoraConfig(r=4, target_modules=LINEAR, lora_bias=True),
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", *LINEAR]),
    "modules_to_save": lambda: peft.LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["lm_head"]),
    "trainable_tokens": lambda: peft.LoraConfig(r=4, target_modules=LINEAR, trainable_token_indices=[1, 5]),
    "ia3": lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=LINEAR),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=LINEAR),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=LINEAR),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


def adapted(kind):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2, attention_bias=kind == "bias", mlp_bias=kind == "bias",
    )  # fmt: skip
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(LlamaForCausalLM(config), CONFIGS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_are_those_of_pefts_own_merge(kind):
    model = adapted(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: None)
    read = {t.name: t for t in policy_tensors(model)}
    merged = copy.deepcopy(model).merge_and_unload()
    expected = dict(merged.named_parameters())
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(read[name].tensor, tensor.detach(), rtol=1e-5, atol=1e-6, msg=name)
    moved = {t.name for t in read.values() if t.trained}
    assert moved
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    if kind != "modules_to_save":
        assert {t.name for t in read.values() if t.adapted} == moved
    # and swapped in with the adapters off, they are the policy
    ids = torch.arange(12)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        values = {t.parameter: t.tensor for t in read.values() if t.adapted}
        with swapped(values), without_adapters(model):
            torch.testing.assert_close(model(input_ids=ids).logits, whole, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(input_ids=ids).logits, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "rslora", "bias"])
def test_elements_of_what_plain_lora_makes_are_those_of_the_merge(kind, dtype):
    model = adapted(kind)
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            parameter.data = parameter.data.to(dtype)
    merged = {t.name: t.tensor for t in policy_tensors(model) if t.adapted}
    found = {t.name: t for t in lora_tensors(model)}
    assert found.keys() == {name for name in merged if name.endswith("weight")}
    for name, tensor in found.items():
        at = torch.arange(0, merged[name].numel(), 7)
        told = tensor.elements(at)
        assert told.dtype == dtype
        torch.testing.assert_close(told, merged[name].flatten()[at], rtol=1e-6 if dtype == torch.float32 else 0.0,
                                   atol=1e-7)  # fmt: skip
        assert tensor.in_place


def test_an_adapter_that_is_merged_or_off_or_another_is_in_place_no_more():
    model = adapted("lora")
    looked = lora_tensors(model)
    model.merge_adapter()
    assert not any(tensor.in_place for tensor in looked)
    model.unmerge_adapter()
    assert all(tensor.in_place for tensor in looked)
    with model.disable_adapter():
        assert not any(tensor.in_place for tensor in looked)
    model.add_adapter("second", CONFIGS["lora"]())
    model.set_adapter("second")
    assert not any(tensor.in_place for tensor in looked)
    assert lora_tensors(model)


def test_a_bias_that_the_adapter_leaves_as_it_is_is_not_trained():
    model = adapted("bias")
    plain = peft.get_peft_model(model.unload(), CONFIGS["lora"]())  # biases in all layers, and no adapter of theirs
    read = {t.name: t for t in policy_tensors(plain)}
    weight, bias = (read[f"model.layers.0.self_attn.q_proj.{leaf}"] for leaf in ("weight", "bias"))
    assert (weight.trained, weight.adapted) == (True, True)
    assert (bias.trained, bias.adapted) == (False, False)
    assert [t.name for t in read.values() if t.trained and t.name.endswith("bias")] == []


@pytest.mark.parametrize("kind", ["dora", "ia3", "loha", "oft", "norms"])
def test_other_methods_have_no_elements_of_plain_lora(kind):
    assert lora_tensors(adapted(kind)) == []
