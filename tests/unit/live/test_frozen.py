"""Frozen weights that move, by an adapter merged and taken out again or left merged, are seen; others are silent."""

import pytest
import torch
from torch import nn

from trl_parity import ParityConfig
from trl_parity.judging.breaker import Breaker
from trl_parity.live.frozen import FrozenWeights
from trl_parity.metrics.statistics import compute
from trl_parity.metrics.sums import MismatchSums
from trl_parity.report.messages import alert_text
from trl_parity.verdict import MismatchStats


class Adapted(nn.Module):
    """A linear layer with an adapter, as PEFT's layers are: merged and unmerged by adding to the base."""

    def __init__(self, dtype=torch.float32, size=64):
        super().__init__()
        self.base = nn.Linear(size, size, bias=False, dtype=dtype).requires_grad_(False)
        self.a, self.b = nn.Parameter(0.1 * torch.randn(4, size)), nn.Parameter(0.1 * torch.randn(size, 4))
        self.merged_adapters = []

    def merge(self):
        self.base.weight.data += (self.b @ self.a).to(self.base.weight)
        self.merged_adapters.append("default")

    def unmerge(self):
        self.base.weight.data -= (self.b @ self.a).to(self.base.weight)
        self.merged_adapters.clear()


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def window(found):
    """The verdict on a healthy window with these sums, and its scalars."""
    sums = MismatchSums.zeros()
    sums.bump(**found)
    values = {name: compute(sums).get(name) for name in ("reference/base_moved", "reference/merged")}
    values |= {"nonfinite_rate": 0.0}
    return Breaker.from_config(ParityConfig(floor_tokens=0)).judge(1, MismatchStats(1, 1, 1, 0, values))


def test_a_sum_of_all_ranks_tells_it():
    sums, other = MismatchSums.zeros(), MismatchSums.zeros()
    sums.bump(frozen_moved=1.0, frozen_size=30.0, merged_layers=1, adapter_layers=2)
    other.bump(frozen_moved=0.0, frozen_size=10.0, merged_layers=0, adapter_layers=2)
    sums.add_(other)
    totals = MismatchSums.from_sparse(sums.to_sparse()).totals()
    assert (totals["frozen_moved"], totals["frozen_size"], totals["merged_layers"]) == (1.0, 40.0, 1.0)
    stats = compute(sums)
    assert (stats["reference/base_moved"], stats["reference/merged"]) == (0.025, 0.25)


def test_an_adapter_merged_into_half_precision_and_out_again_warns():
    model, frozen = nn.Sequential(Adapted(torch.bfloat16), Adapted(torch.bfloat16)), FrozenWeights()
    assert frozen.moved(model)["frozen_moved"] == 0.0
    for _ in range(20):  # syncs, the adapter trained in between
        for layer in model:
            layer.merge()
            layer.unmerge()
            layer.b.data += 0.02 * torch.randn_like(layer.b)
    verdict = window(frozen.moved(model))
    assert verdict.warnings == ("reference/base_moved",)
    assert not verdict.breaches
    assert "The frozen base has moved by" in alert_text(verdict)


def test_the_same_in_float32_is_rounding_and_training_moves_nothing_frozen():
    model, frozen = nn.Sequential(Adapted(), Adapted()), FrozenWeights()
    frozen.moved(model)
    for _ in range(20):
        for layer in model:
            layer.merge()
            layer.unmerge()
            layer.b.data += 0.02 * torch.randn_like(layer.b)
    verdict = window(frozen.moved(model))
    assert 0 < verdict.stats["reference/base_moved"] < 1e-5
    assert verdict.stats["reference/merged"] == 0.0
    assert not verdict.warnings


def test_an_adapter_left_merged_warns_at_once():
    model, frozen = nn.Sequential(Adapted(), Adapted()), FrozenWeights()
    model[1].merge()  # before the first look
    verdict = window(frozen.moved(model))
    assert verdict.warnings == ("reference/merged",)
    assert verdict.stats["reference/merged"] == 0.5
    assert "50% of the adapter's layers are still merged" in alert_text(verdict)
    model[1].unmerge()
    model[0].merge()
    assert set(window(frozen.moved(model)).warnings) == {"reference/base_moved", "reference/merged"}


def test_where_nothing_is_frozen_nothing_is_known():
    model = nn.Linear(4, 4)
    assert FrozenWeights().moved(model) == {}
    verdict = window({})
    assert verdict.stats["reference/base_moved"] is None
    assert not verdict.warnings


def test_what_is_kept_is_bounded_and_anew_when_other_weights_are_frozen():
    model = nn.ParameterList(nn.Parameter(torch.ones(40, 40), requires_grad=False) for _ in range(600))
    frozen = FrozenWeights()
    assert frozen.moved(model)["frozen_size"] == 512 * 256
    with torch.no_grad():
        model[0].mul_(2.0)
    assert frozen.moved(model)["frozen_moved"] == 256
    model.append(nn.Parameter(torch.ones(3), requires_grad=False))
    assert frozen.moved(model)["frozen_moved"] == 0
    for p in list(model)[101:]:
        p.requires_grad_(True)
    assert frozen.moved(model) == {"frozen_moved": 0.0, "frozen_size": 102.0 * 256}
