"""Where drift is: in few sequences and prompts, or everywhere; against sorted numbers and permutations."""

import numpy as np
import pytest
import torch

from trl_parity.metrics.statistics import compute, measure
from trl_parity.records import ScoredBatch
from trl_parity.report.places import concentrated

ROWS, TOKENS = 64, 32


def batch_of(delta, lengths=None, prompts=None):
    rows, columns = delta.shape
    rollout = torch.full((rows, columns), -1.0, dtype=torch.float64)
    trainer = rollout + torch.as_tensor(delta)
    mask = torch.arange(columns) < torch.as_tensor([columns] * rows if lengths is None else lengths)[:, None]
    return ScoredBatch(
        mask=mask, rollout_logprobs=rollout, trainer_logprobs=trainer, own_logprobs=trainer, entropy=None,
        keys=torch.arange(rows), prompts=None if prompts is None else torch.as_tensor(prompts),
    )  # fmt: skip


def naive(delta, lengths):
    """Share of the sequences that carries 90 % of the k3, whole sequences; dispersion over 300 permutations."""
    rng = np.random.default_rng(1)
    k3 = [np.expm1(row[:n]) - row[:n] for row, n in zip(delta, lengths, strict=True)]
    sums = sorted((float(x.sum()) for x in k3), reverse=True)
    count, got = 0, 0.0
    while got < 0.9 * sum(sums):
        got += sums[count]
        count += 1
    tokens, cuts = np.concatenate(k3), np.cumsum(lengths)[:-1]
    dealt = [sum(part.sum() ** 2 for part in np.split(rng.permutation(tokens), cuts)) for _ in range(300)]
    return count / len(k3), sum(x.sum() ** 2 for x in k3) / np.mean(dealt)


@pytest.mark.parametrize("kind", ["normal", "heavy", "few"])
def test_the_shares_are_those_of_sorted_sequences_and_permuted_tokens(kind):
    rng = np.random.default_rng(0)
    delta = 0.05 * (rng.standard_t(3, (ROWS, TOKENS)) if kind == "heavy" else rng.standard_normal((ROWS, TOKENS)))
    if kind == "few":
        delta[:5] *= 10.0
    lengths = rng.integers(1, TOKENS + 1, ROWS)
    stats = compute(measure(batch_of(delta, lengths)))
    share, dispersion = naive(delta, lengths)
    assert stats["concentration/sequences"] == pytest.approx(share, abs=1.0 / ROWS + 0.01)
    assert stats["concentration/dispersion"] == pytest.approx(dispersion, rel=0.1)
    assert stats["concentration/prompts"] is None


def test_a_drift_of_the_answers_to_one_prompt_of_eight_is_said():
    delta = 0.02 * np.random.default_rng(0).standard_normal((ROWS, TOKENS))
    prompts = np.arange(ROWS) // 8
    delta[prompts == 3] *= 12.0
    parts = [measure(batch_of(delta[i::2], prompts=prompts[i::2])) for i in range(2)]  # half of each group on a rank
    parts[0].add_(parts[1])
    stats = compute(parts[0])
    assert stats["concentration/sequences"] == pytest.approx(1 / 8, abs=0.02)
    assert stats["concentration/prompts"] == pytest.approx(1 / 8, abs=0.02)
    assert stats["concentration/dispersion"] > 4
    text = concentrated(stats)
    assert "12% of the sequences carry 90 % of the k3, in those of" in text
    assert "of the prompts." in text


def test_one_sick_token_in_many_answers_is_a_heavy_tail_not_a_place():
    """Few sequences carry it, as few would wherever such tokens fell."""
    rng = np.random.default_rng(0)
    delta = 0.02 * rng.standard_normal((ROWS, TOKENS))
    for row in rng.choice(ROWS, 8, replace=False):
        delta[row, rng.integers(TOKENS)] = 3.0
    stats = compute(measure(batch_of(delta)))
    assert stats["concentration/sequences"] < 0.2
    assert stats["concentration/dispersion"] < 1.5
    assert concentrated(stats) == ""


@pytest.mark.parametrize("rows", [8, 16, 64])
def test_healthy_noise_with_heavy_tails_is_nowhere(rows):
    rng = np.random.default_rng(0)
    for _ in range(60):
        delta = 0.02 * rng.standard_t(3, (rows, TOKENS)) * np.exp(0.25 * rng.standard_normal((rows, 1)))
        lengths = np.maximum(1, TOKENS * rng.beta(2, 2, rows)).astype(int)
        assert concentrated(compute(measure(batch_of(delta, lengths), bootstrap_samples=2))) == ""


def test_nothing_is_told_of_one_sequence_or_of_no_drift():
    for delta in (np.full((1, 4), 0.1), np.zeros((4, 4))):
        stats = compute(measure(batch_of(delta)))
        assert [stats[f"concentration/{name}"] for name in ("sequences", "prompts", "dispersion")] == [None] * 3
        assert concentrated(stats) == ""
