"""E[min(p / q, 2)] <= 1 over tokens drawn from q, whatever p is: more of it is no law's."""

import pytest
import torch

from trl_parity.diagnosis.honesty import excess

ROWS, LENGTH, VOCABULARY = 64, 48, 40


def drawn(shift=0, report=lambda logprobs: logprobs, spread=0.3, temperature=1.0, seed=0):
    """Δ of tokens drawn from a law q that is the trainer's with noise; ``report`` makes numbers of q's log-probs."""
    g = torch.Generator().manual_seed(seed)
    ours = 2.0 * torch.randn(ROWS, LENGTH, VOCABULARY, generator=g)
    q = ((ours + spread * torch.randn(ours.shape, generator=g)) / temperature).log_softmax(-1)
    tokens = q.exp().reshape(-1, VOCABULARY).multinomial(1, generator=g).reshape(ROWS, LENGTH, 1)
    p, reported = ours.log_softmax(-1).gather(-1, tokens)[..., 0], report(q.gather(-1, tokens)[..., 0])
    return (p - reported.roll(shift, 1)).double().flatten()


ROW = torch.arange(ROWS).repeat_interleave(LENGTH)
ALL = torch.ones(ROWS * LENGTH, dtype=torch.bool)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("spread", "temperature"), [(0.0, 1.0), (0.01, 1.0), (0.3, 1.0), (2.0, 1.0), (0.0, 0.5), (0.3, 2.0)]
)
def test_any_law_reported_as_it_is_is_honest(spread, temperature, seed):
    assert excess(drawn(spread=spread, temperature=temperature, seed=seed), ALL, ROW, 1e-5) is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("shift", "report"),
    [
        (3, lambda x: x),
        (0, lambda x: 1.44 * x),
        (0, lambda x: x.mean(1, keepdim=True).expand_as(x)),
        (0, lambda x: x[torch.randperm(ROWS)]),
    ],
    ids=["shifted", "another base", "averaged", "of other rows"],
)
def test_numbers_that_are_no_law_are_seen(shift, report, seed):
    torch.manual_seed(seed)
    assert excess(drawn(shift, report, seed=seed), ALL, ROW, 1e-5) > 1.02


def test_one_sequence_and_none_tell_nothing():
    delta = torch.full((LENGTH,), 0.5, dtype=torch.float64)
    assert excess(delta, ALL[:LENGTH], ROW[:LENGTH], 0.0) is None
    assert excess(delta * torch.nan, ALL[:LENGTH], ROW[:LENGTH], 0.0) is None
