"""Sums over the ranks."""

import pytest
import torch
from support.processes import run_on_ranks


@pytest.mark.slow_unit
def test_ranks_hold_the_same_sums_after_the_reduction(tmp_path):
    from trl_parity.metrics.statistics import compute
    from trl_parity.metrics.sums import MismatchSums

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


def test_a_window_costs_less_than_64_kib_of_reduction_whatever_its_tokens():
    from trl_parity.judging.noise_floor import SOURCES
    from trl_parity.metrics.sums import MismatchSums

    window, floor = MismatchSums.zeros(), MismatchSums.zeros(bootstrap_samples=2)
    size = sum(8 * (x.additive.numel() + x.maxima.numel()) for x in (window, *[floor] * len(SOURCES)))
    assert size <= 64 << 10  # with the noise floor measured in the same window
