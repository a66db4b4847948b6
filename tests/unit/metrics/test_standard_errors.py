"""Standard errors over independent sequences, and how many rows are one draw, against loops in fp64."""

import math

import pytest
import torch
from support.batches import random_batch

from trl_parity.metrics.statistics import compute, measure
from trl_parity.metrics.sums import ADDED, MismatchSums, _places
from trl_parity.records import ScoredBatch


def batch_of(rows, keys=None, seed=0, scale=0.1):
    """Rows of 8 tokens at most; those of equal keys are equal."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.arange(rows) * 7919 + 10**9 * seed if keys is None else torch.tensor(keys)
    distinct, row_of = keys.unique(return_inverse=True)
    delta = (scale * torch.randn(len(distinct), 8, generator=generator, dtype=torch.float64))[row_of]
    lengths = torch.randint(2, 9, (len(distinct),), generator=generator)[row_of]
    rollout = torch.full((rows, 8), -1.0, dtype=torch.float64)
    return ScoredBatch(
        mask=torch.arange(8) < lengths[:, None], rollout_logprobs=rollout, trainer_logprobs=rollout + delta,
        own_logprobs=rollout + delta, entropy=torch.ones(rows, 8), keys=keys,
    )  # fmt: skip


def merged(*batches):
    total = MismatchSums.zeros()
    for batch in batches:
        total.add_(measure(batch))
    return compute(total)


def oracle(batches, of):
    """The standard error of the mean of ``of`` (Δ) over tokens, with clusters of equal keys over all batches."""
    clusters = {}
    for batch in batches:
        for row, key in enumerate(batch.keys.tolist()):
            deltas = (batch.trainer_logprobs - batch.rollout_logprobs)[row][batch.mask[row]].tolist()
            total, n = clusters.get(key, (0.0, 0))
            clusters[key] = (total + math.fsum(map(of, deltas)), n + len(deltas))
    n = sum(c[1] for c in clusters.values())
    mean = sum(c[0] for c in clusters.values()) / n
    effective = n * n / sum(c[1] ** 2 for c in clusters.values())
    squares = math.fsum((total - mean * size) ** 2 for total, size in clusters.values())
    return math.sqrt(squares * effective / (effective - 1)) / n


OF = {"kl_k1": lambda d: -d, "logp_abs_diff/mean": abs, "kl_k3": lambda d: math.expm1(d) - d}


@pytest.mark.parametrize("keys", [None, [1, 1, 1, 2, 3, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 12]])
def test_standard_errors_are_those_of_a_loop_over_clusters(keys):
    batches = [batch_of(8, keys), batch_of(8, seed=1)]
    stats = merged(*batches)
    for stat, of in OF.items():
        assert stats[f"se/{stat}"] == pytest.approx(oracle(batches, of), rel=1e-9), stat
    assert stats["copies"] == (1 if keys is None else max(map(keys.count, keys)))


def test_equal_rows_on_other_ranks_are_one_draw_too():
    """Eight ranks, a row each, all of one seed."""
    batch = batch_of(1)
    others = [batch_of(1, seed=seed) for seed in range(1, 9)]
    apart, alike = merged(batch, *others), merged(*[batch] * 8, *others)
    assert apart["copies"] == 1
    assert 4 < alike["copies"] < 8  # of 16 rows, tokens count
    groups = [batch_of(1, [key], seed=key) for key in range(1, 17)]
    one, eight = merged(*groups), merged(*groups * 8)
    assert eight["copies"] == pytest.approx(8, rel=0.3)
    assert eight["se/kl_k3"] == pytest.approx(one["se/kl_k3"], rel=0.25)
    assert merged(*groups)["copies"] == 1


def test_one_draw_has_no_standard_error():
    stats = merged(batch_of(4, [5, 5, 5, 5]))
    assert (stats["copies"], stats["se/kl_k3"]) == (4, None)


def test_the_clipped_ratio_and_its_square_are_exact():
    batch = batch_of(16, scale=1.0)
    w = (batch.trainer_logprobs - batch.rollout_logprobs)[batch.mask].exp().clamp(max=2.0)
    stats = merged(batch)
    assert stats["ratio/clipped"] == pytest.approx(w.mean().item(), rel=1e-12)
    assert stats["ratio/clipped_square"] == pytest.approx(((w - 1) ** 2).mean().item(), rel=1e-12)


def test_without_keys_all_rows_differ_and_a_ratio_of_e300_is_a_number():
    assert compute(measure(random_batch(torch.Generator().manual_seed(0), 6, 5, 0.1)))["copies"] == 1
    far = batch_of(8)
    far.trainer_logprobs[0, 0] = 290.0
    stats = merged(far)
    assert 1.0 <= stats["ratio/clipped"] <= 2.0
    assert stats["se/kl_k3"] > 1e90


def test_a_window_saved_before_these_sums_has_none_of_them():
    saved = measure(batch_of(8)).to_sparse()
    [added] = [place for name, place, _ in _places(200) if name == "added"]
    first = added.start + ADDED.index("clipped")
    old = {i: x for i, x in saved["additive"].items() if int(i) < first}
    stats = compute(MismatchSums.from_sparse(saved | {"additive": old, "maxima": saved["maxima"][:5]}))
    assert stats["kl_k3"] is not None
    assert [stats[name] for name in ("ratio/clipped", "se/kl_k3", "copies")] == [None] * 3
    half = MismatchSums.from_sparse(saved | {"additive": old, "maxima": saved["maxima"][:5]})
    half.add_(measure(batch_of(8, seed=2)))
    assert compute(half)["ratio/clipped"] is None
    again = MismatchSums.from_sparse(saved)
    assert again.to_sparse() == saved
    assert compute(again)["copies"] == 1
