"""The noise floor in force, and when it is measured anew."""

import itertools

import torch

from trl_parity import ParityConfig
from trl_parity.judging.noise_floor import NoiseFloor
from trl_parity.metrics.scalars import FLOORED
from trl_parity.metrics.statistics import measure
from trl_parity.metrics.sums import MismatchSums
from trl_parity.records import ScoredBatch

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
