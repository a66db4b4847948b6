"""What tensors read back from an engine say of how they got there."""

import copy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl_parity.diagnosis.probes.weight_sync import _cause, _read, _words
from trl_parity.engine.weight_readback import policy_tensors


class Loaded(torch.nn.Module):
    """An engine's module with the trainer's names, whose loader may be a faulty one."""

    def __init__(self, policy, change=lambda name, tensor: (name, tensor)):
        super().__init__()
        self.held = torch.nn.ParameterDict(
            {n.replace(".", "/"): p.detach().clone() for n, p in policy.named_parameters()}
        )
        with torch.no_grad():
            for name, tensor in policy.named_parameters():
                name, tensor = change(name, tensor.detach())
                self.held[name.replace(".", "/")].copy_(tensor)

    def load_weights(self, weights):
        for name, tensor in weights:
            self.held[name.replace(".", "/")].data.copy_(tensor)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def told(policy, change):
    held = _read(policy, Loaded(policy, change), torch.float32)
    return held, _cause(held), _words(held, "float32")


def in_some(part, change):
    return lambda name, tensor: (name, change(tensor) if part in name else tensor)


def test_matrices_in_a_narrower_dtype_did_arrive(policy):
    held, cause, words = told(policy, in_some("layers.1.mlp", lambda t: t.bfloat16().float()))
    assert cause == "dtype_gap"
    assert held.partial
    assert words.startswith("3 of 21 tensors are not the trainer's in the engine's float32")
    assert "3 of them rounded to bfloat16: model.layers.1.mlp.gate_proj.weight, " in words


def test_eight_bits_in_some_layers_are_named_with_their_tensors(policy):
    _, cause, words = told(policy, in_some("layers.0.mlp", lambda t: t.to(torch.float8_e4m3fn).float()))
    assert cause == "kv_cache_precision"
    assert words.endswith(
        "mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight, model.layers.0.mlp.down_proj.weight"
    )


def test_tensors_in_each_others_place_are_told(policy):
    other = {"q_proj": "k_proj", "k_proj": "q_proj"}

    def swapped(name, tensor):
        for one, two in other.items():
            if "layers.0" in name and one in name:
                return name.replace(one, two), tensor
        return name, tensor

    held, cause, words = told(policy, swapped)
    names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qk"]
    assert dict(held.exchanged) == {names[0]: names[1], names[1]: names[0]}
    assert cause == "partial_sync"
    assert f"{names[0]} holds {names[1]}" in words


def test_older_weights_are_neither(policy):
    held, cause, words = told(policy, lambda name, tensor: (name, tensor + 1e-3 * torch.randn(tensor.shape)))
    assert (cause, dict(held.rounded), dict(held.exchanged)) == ("stale_weights", {}, {})
    assert words == "21 of 21 tensors are not the trainer's in the engine's float32"
    assert held.differing.keys() == {name for name, _ in policy.named_parameters()}


def lost(policy, seen, optimizer=None):
    """A sync lost after an update of these tensors; what the others hold is the trainer's."""
    before = copy.deepcopy(policy)
    with torch.no_grad():
        for name, tensor in policy.named_parameters():
            if seen(name):
                tensor.add_(1e-2 * torch.randn(tensor.shape).sign())
    return _read(policy, Loaded(before), torch.float32, optimizer)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_what_no_gradient_has_moved_is_alike_and_did_not_arrive(policy, kind):
    """As the experts that no token takes, and the head of a batch whose advantages are zero."""
    policy = copy.deepcopy(policy)
    optimizer = kind(policy.parameters(), lr=0.0)
    policy(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    for name, tensor in policy.named_parameters():
        if "layers.1" in name:
            tensor.grad.zero_()
        if "lm_head" in name:
            tensor.grad = None
    optimizer.step()
    held = lost(policy, lambda name: "layers.1" not in name and "lm_head" not in name, optimizer)
    assert 0 < len(held.differing) < 21
    if kind is torch.optim.AdamW:
        assert (held.arrived, _cause(held)) == (0, "stale_weights")
    else:  # keeps nothing of gradients
        assert (held.arrived > 0, _cause(held)) == (True, "partial_sync")


def test_what_has_moved_and_is_alike_did_arrive(policy):
    policy = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
    policy(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    optimizer.step()
    held = lost(policy, lambda name: "layers.0" in name, optimizer)
    assert held.arrived >= 7
    assert _cause(held) == "partial_sync"


def test_an_engine_may_lack_what_no_gradient_has_moved(policy):
    """A vision tower's last layers, which the model does not look at, and the engine does not build."""

    class Without(Loaded):
        def load_weights(self, weights):
            super().load_weights((name, tensor) for name, tensor in weights if "layers.1" not in name)

    def older(name, tensor):
        return name, tensor + 0.01 * torch.randn_like(tensor)

    policy = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
    for moved, ignored, cause in ("layers.0", 0, "stale_weights"), ("layers", 9, "partial_sync"):
        optimizer.zero_grad()
        for name, parameter in policy.named_parameters():
            parameter.grad = torch.ones_like(parameter) if moved in name else None
        optimizer.step()
        held = _read(policy, Without(policy, older), torch.float32, optimizer)
        assert (len(held.ignored), _cause(held)) == (ignored, cause)


class LoadedMerged(Loaded):
    """An engine's module that holds the base and what ``adapters`` makes of what the merge added."""

    def __init__(self, model, adapters):
        tensors = list(policy_tensors(model))
        super().__init__(Named({t.name: t.tensor for t in tensors}))
        for t in tensors:
            if t.adapted:
                base = t.parameter.detach()
                self.held[t.name.replace(".", "/")].data.copy_((base + adapters(t.tensor - base)).bfloat16())


class Named(dict):
    def named_parameters(self):
        return self.items()


@pytest.mark.parametrize(
    ("adapters", "cause", "counts"),
    [
        (lambda d: 0.5 * d, "partial_sync", 0.5),
        (lambda d: 2.0 * d, "partial_sync", 2.0),
        (lambda d: 0.5 * d + 0.2 * d.abs().mean() * torch.randn(d.shape), "stale_weights", None),  # older, of its own
        (lambda d: 0.0 * d, "stale_weights", None),
    ],
)
def test_adapters_that_count_in_part_are_no_older_ones(policy, adapters, cause, counts):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(policy), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) * parameter.requires_grad)
    held = _read(model, LoadedMerged(model, adapters), torch.bfloat16)
    assert _cause(held) == cause
    assert held.adapter_counts == (None if counts is None else pytest.approx(counts, abs=0.02))
