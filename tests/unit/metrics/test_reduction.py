"""Sums over the ranks."""

from types import SimpleNamespace

import pytest
import torch
from support.batches import random_batch
from support.processes import run_on_ranks

from trl_parity.metrics.reduction import reduce_many, reduce_sums
from trl_parity.metrics.statistics import measure
from trl_parity.metrics.sums import MismatchSums


@pytest.mark.slow_unit
def test_ranks_hold_the_same_sums_after_the_reduction(tmp_path):
    from trl_parity.metrics.statistics import compute

    world = 3
    code = "import sys\nfrom support.ranks import reduce_on\nreduce_on(sys.argv[1])"
    run_on_ranks(world, code, tmp_path, tmp_path, ACCELERATE_USE_CPU="true")
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(world)]
    expected = MismatchSums.zeros()
    for own, _, _ in results:
        expected.add_(own)
    for _, reduced, rows in results:
        torch.testing.assert_close(reduced.additive, expected.additive)
        assert torch.equal(reduced.additive, results[0][1].additive)  # to the last bit: one verdict everywhere
        assert torch.equal(reduced.maxima, expected.maxima)
        assert [row["rank"] for row in rows] == [1, 2, 2]
        told = torch.stack([torch.cat([own.replica, own.maxima[:2]]) for own, _, _ in results])
        assert torch.equal(reduced.by_rank, told)  # of each rank, in their order
    assert compute(results[0][1])["kl_k3"] == compute(results[2][1])["kl_k3"] > 0


class OfTwo:
    """Stands for the accelerator of one of two ranks; the other holds ``theirs``."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, theirs):
        self._theirs = theirs

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return tensor.add_(self._theirs.additive)  # in place, as some backends do

    def gather(self, tensor):
        theirs = torch.cat([self._theirs.maxima, self._theirs.replica], dim=-1)
        return torch.cat([tensor, theirs.unsqueeze(0)])


def test_sums_add_and_maxima_are_the_largest_over_ranks_and_each_keeps_its_own():
    mine, theirs = ([measure(random_batch(torch.Generator().manual_seed(i), 6, 9, 0.1)) for i in ids]
                    for ids in ((0, 1), (2, 3)))  # fmt: skip
    before = mine[0].copy()
    many = MismatchSums(torch.stack([x.additive for x in theirs]), torch.stack([x.maxima for x in theirs]), 200)
    found = [reduce_sums(mine[0], OfTwo(theirs[0])), *reduce_many(mine, OfTwo(many))]
    for got, own, other in zip(found, [mine[0], *mine], [theirs[0], *theirs], strict=True):
        assert torch.equal(got.additive, own.additive + other.additive)
        assert torch.equal(got.maxima, torch.maximum(own.maxima, other.maxima))
        assert got.bootstrap_samples == 200
    assert torch.equal(found[0].by_rank[:, :3], torch.stack([mine[0].replica, theirs[0].replica]))
    assert torch.equal(found[0].by_rank[:, 3:], torch.stack([mine[0].maxima[:2], theirs[0].maxima[:2]]))
    assert torch.equal(mine[0].additive, before.additive)
    alone = SimpleNamespace(num_processes=1)
    assert reduce_sums(mine[0], alone) is mine[0]
    assert reduce_many(mine, alone) == mine


def test_a_window_costs_less_than_64_kib_of_reduction_whatever_its_tokens():
    from trl_parity.judging.noise_floor import SOURCES

    window, floor = MismatchSums.zeros(), MismatchSums.zeros(bootstrap_samples=2)
    size = sum(8 * (x.additive.numel() + x.maxima.numel()) for x in (window, *[floor] * len(SOURCES)))
    assert size <= 64 << 10  # with the noise floor measured in the same window
