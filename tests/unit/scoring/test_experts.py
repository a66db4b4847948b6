"""Which experts a policy's routers take, and the same policy with others."""

import pytest
import torch

from trl_parity.scoring.experts import Forced, Routes, expert_layers, forced
from trl_parity.scoring.perturb import rounding_noise

IDS = torch.arange(12).reshape(1, 12)


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def seen_by(layer, model):
    """Hidden states, experts and weights of a pass."""
    calls = []
    handle = layer.experts.register_forward_pre_hook(lambda module, args: calls.append(args[:3]))
    logits_of(model)
    handle.remove()
    return calls[0]


def test_a_layers_choice_is_the_one_it_makes_in_a_pass(model):
    layers = expert_layers(model)
    assert [layer.name for layer in layers] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    for layer in layers:
        hidden, experts, weights = seen_by(layer, model)
        again, same = layer.choice(hidden)
        assert torch.equal(experts, again)
        assert torch.equal(weights, same)
    assert not expert_layers(torch.nn.Linear(2, 2))


def test_forced_tokens_take_other_experts_and_the_rest_their_own(model):
    layers = expert_layers(model)
    before = logits_of(model)
    none = [Forced(torch.zeros(12, dtype=torch.bool), torch.zeros(12, 2, dtype=torch.long), torch.ones(12, 2))] * 2
    with forced(layers, none):
        assert torch.equal(logits_of(model), before)
    last = torch.arange(12) == 11
    _, experts, weights = seen_by(layers[1], model)
    swapped = [none[0], Forced(last, (experts + 1) % 6, weights)]
    with forced(layers, swapped):
        after = logits_of(model)
    torch.testing.assert_close(after[0, :11], before[0, :11], rtol=0, atol=1e-6)
    assert (after[0, 11] - before[0, 11]).abs().max() > 1e-4
    assert torch.equal(logits_of(model), before)  # nothing is left of it


def test_a_pass_held_to_noted_routes_differs_by_all_but_their_flips(model):
    layers = expert_layers(model)
    routes = Routes(layers)
    with routes.noted():
        _, plain, given = seen_by(layers[0], model)
    assert routes.known
    with rounding_noise(model.model, torch.float8_e4m3fn, seed=0):
        _, free, _ = seen_by(layers[0], model)
        flipped = (free.sort(-1).values != plain.sort(-1).values).any(-1)
        assert 0 < flipped.sum() < 12
        with routes.held():
            _, experts, weights = seen_by(layers[0], model)  # hooked after those that hold
        assert torch.equal(experts.sort(-1).values, plain.sort(-1).values)
        assert torch.equal(experts[~flipped], free[~flipped])
    assert routes.tokens == 24
    assert int(flipped.sum()) <= routes.flips <= int(flipped.sum()) + 12  # of the first layer and of the second
    assert torch.equal(weights[flipped], given[flipped])
    assert not torch.equal(weights[~flipped], given[~flipped])  # the rest is as rounding has it
    with routes.held():  # nothing is rounded: nothing is held
        logits_of(model)
    assert (routes.tokens, routes.flips) == (48, routes.flips)


def test_routes_that_cannot_be_read_are_not_known():
    class OtherExperts(torch.nn.Module):
        def forward(self, hidden):
            return hidden

    block = torch.nn.Sequential(torch.nn.Linear(4, 4), OtherExperts())
    routes = Routes(expert_layers(block))
    with routes.noted():
        block(torch.zeros(3, 4))
    assert not routes.known
    assert not Routes([]).known
    assert not Routes(expert_layers(block)).known  # no pass yet


def test_another_sequence_or_another_way_of_routing_is_refused(model):
    layers = expert_layers(model)
    long = Forced(torch.ones(13, dtype=torch.bool), torch.zeros(13, 2, dtype=torch.long), torch.ones(13, 2))
    with forced(layers, [long, long]), pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts routes \(12, 2\)"):
        logits_of(model)

    class OtherExperts(torch.nn.Module):
        def forward(self, hidden):
            return hidden

    block = torch.nn.Sequential(torch.nn.Linear(4, 4), OtherExperts())
    [layer] = expert_layers(block)
    with pytest.raises(ValueError, match="1 is not called with experts and weights of each token"):
        layer.choice(torch.zeros(3, 4))
