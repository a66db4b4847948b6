"""Where two routers part on the same hidden states."""

import pytest
import torch

from trl_parity.diagnosis.probes.base import NotPossible
from trl_parity.diagnosis.probes.routing import _why, apart
from trl_parity.engine.routing import Routed, Routing, recorded
from trl_parity.scoring.experts import ExpertLayer

EXPERTS = torch.tensor([[0, 1], [2, 3], [4, 5], [1, 2]])
WEIGHTS = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5], [0.9, 0.1]])


def routed(experts, weights, logits=None, bias=None):
    logits = torch.randn(len(experts), 6) if logits is None else logits
    return Routed(hidden=torch.zeros(len(experts), 3), logits=logits, experts=experts, weights=weights, bias=bias)


def test_the_order_of_experts_and_a_common_factor_are_no_difference():
    forced, kinds = apart(EXPERTS, WEIGHTS, routed(EXPERTS.flip(-1), 2.5 * WEIGHTS.flip(-1)))
    assert not forced.tokens.any()
    assert kinds.tolist() == [0.0, 0.0]


def test_other_experts_and_other_weights_are_told_apart_and_taken_over():
    experts, weights = EXPERTS.clone(), 2.0 * WEIGHTS
    experts[1] = torch.tensor([3, 4])
    weights[3] = torch.tensor([1.0, 1.0])
    forced, kinds = apart(EXPERTS, WEIGHTS, routed(experts, weights))
    assert forced.tokens.tolist() == [False, True, False, True]
    assert kinds.tolist() == [1.0, 1.0]
    assert torch.equal(forced.experts, experts)
    torch.testing.assert_close(forced.weights, weights / 2.0)
    with pytest.raises(NotPossible, match="the engine takes 1 experts a token, the trainer 2"):
        apart(EXPERTS, WEIGHTS, routed(EXPERTS[:, :1], WEIGHTS[:, :1]))


def layer_of(bias=None):
    block = torch.nn.Module()
    if bias is not None:
        block.register_buffer("e_score_correction_bias", bias)
    return ExpertLayer("mlp.experts", block, block)


def test_a_frozen_correction_bias_and_a_coarse_router_are_said():
    bias = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.0, 0.0])
    frozen = routed(EXPERTS, WEIGHTS, bias=torch.zeros(6))
    assert "correction bias (e_score_correction_bias) is not the engine's, by 0.2" in _why(layer_of(bias), frozen)
    assert _why(layer_of(bias), routed(EXPERTS, WEIGHTS, bias=bias + 1.0)) == ""
    assert _why(layer_of(), routed(EXPERTS, WEIGHTS)) == ""
    coarse = routed(EXPERTS, WEIGHTS, logits=torch.randn(4, 6).bfloat16().float())
    assert _why(layer_of(), coarse) == "; the engine's router logits are bfloat16 numbers"


class Router:
    e_score_correction_bias = torch.ones(6)

    def select_experts(self, hidden_states, router_logits, topk_indices_dtype=None):
        return router_logits.softmax(-1)[:, :2], torch.arange(2).expand(len(hidden_states), 2).int()


def test_an_engines_choices_are_recorded_in_chunks_and_nothing_is_left_of_it():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].router = router = Router()
    with recorded(model) as layers:
        for n in (3, 2):
            router.select_experts(hidden_states=torch.ones(n, 4), router_logits=torch.zeros(n, 6))
    assert "select_experts" not in vars(router)
    [layer] = layers
    found = layer.of(5)
    assert (found.hidden.shape, found.experts.shape, found.experts.dtype) == ((5, 4), (5, 2), torch.int64)
    assert torch.equal(found.bias, torch.ones(6))
    with pytest.raises(RuntimeError, match="asked for 5 tokens of a sequence of 4"):
        layer.of(4)
    with pytest.raises(RuntimeError, match="chooses experts by itself"):
        Routing(router).of(4)


def test_what_somebody_else_put_in_a_routers_place_is_there_again():
    model = torch.nn.Module()
    model.router = Router()
    mine = lambda *args: Router.select_experts(model.router, *args)  # noqa: E731
    model.router.select_experts = mine
    with recorded(model) as [layer]:
        model.router.select_experts(torch.zeros(2, 3), torch.zeros(2, 6))
    assert layer.of(2).experts.tolist() == [[0, 1], [0, 1]]
    assert model.router.select_experts is mine
