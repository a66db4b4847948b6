"""Which tokens a sample scores: each with its probability, the last ones always, and nobody's random numbers move."""

import pytest
import torch

from trl_parity.scoring.token_sample import TokenSample

LENGTHS = (9, 1, 2, 40, 13)


def rows(lengths=LENGTHS):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
def test_tokens_of_a_sequence_are_drawn_with_one_probability_and_stand_for_all_of_it(share):
    sequence, n = rows(), sum(LENGTHS)
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    seen, draws = torch.zeros(n), 150
    for seed in range(draws):
        kept, weights = TokenSample(share, seed).draw(sequence)
        assert (kept.diff() > 0).all()
        standing = torch.zeros(len(LENGTHS)).index_add(0, sequence[kept], weights)
        torch.testing.assert_close(standing, torch.tensor(LENGTHS).float())
        counts = torch.bincount(sequence[kept], minlength=len(LENGTHS))
        assert counts.tolist() == [1 + -(-(k - 1) * share // 1) for k in LENGTHS]
        assert weights[torch.isin(kept, last)].eq(1).all()
        seen[kept] += 1
    for i, length in enumerate(LENGTHS):
        some = (sequence == i).nonzero()[:-1, 0]
        if len(some):
            p = -(-len(some) * share // 1) / len(some)
            assert ((seen[some] / draws - p).abs() < 5 * (p * (1 - p) / draws) ** 0.5 + 1e-9).all(), length


def test_draws_are_repeatable_and_leave_the_global_random_numbers_alone():
    before = torch.get_rng_state()
    one, other, third = (TokenSample(0.2, seed).draw(rows())[0] for seed in (7, 7, 8))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_sample_draws_anew_from_each_part_of_a_pass():
    sample = TokenSample(0.2, 0)
    parts = [sample.draw(rows())[0] for _ in range(4)]
    assert len({tuple(part.tolist()) for part in parts}) > 1
    assert (sample.seen, sample.drawn) == (4 * sum(LENGTHS), sum(map(len, parts)))


def test_no_token_is_drawn_from_none():
    kept, weights = TokenSample(0.2, 0).draw(rows(()))
    assert (len(kept), len(weights)) == (0, 0)


@pytest.mark.parametrize(
    ("share", "tokens", "least", "drawn"),
    [(0.01, 10_000, 100, 0.01), (0.01, 10_000, 1_000, 0.1), (0.01, 10_000, 5_001, None), (0.6, 10_000, 1, None),
     (0.0, 8_192, 4_096, 0.5), (0.1, 0, 4_096, None), (0.0, 1, 1, None)],
)  # fmt: skip
def test_a_sample_is_never_smaller_than_the_least_and_never_most_of_a_batch(share, tokens, least, drawn):
    sample = TokenSample.of(share, tokens, least, seed=0)
    assert (sample and sample.share) == drawn
