"""The replay of sampling settings against loops over tokens: no vLLM, each number by its rule."""

import math

import pytest
import torch
from support.sampling import naive_kept

from trl_parity.records import SamplingSettings
from trl_parity.scoring.sampling import cut, kept_mask, penalize, replay, replay_top, settings_of, turns


@pytest.mark.parametrize("top_k", [0, -1, 1, 4, 11, 12])
@pytest.mark.parametrize("top_p", [1.0, 0.93, 0.6, 0.05])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3])
def test_what_is_kept_and_what_it_is_scored(top_k, top_p, min_p):
    logits = torch.randn(9, 12, generator=torch.Generator().manual_seed(top_k + 5), dtype=torch.float64) * 2
    settings, temperature = SamplingSettings(top_k=top_k, top_p=top_p, min_p=min_p), 0.8
    kept = kept_mask(logits / temperature, settings)
    targets = torch.arange(9) % 12
    scores = replay(logits, targets, settings, temperature)
    whole = (logits / temperature).log_softmax(-1)
    for most in (12, 9, 3):  # from the most likely alone: the same, wherever it can be known
        found, known = replay_top(whole.topk(most).values, whole[torch.arange(9), targets], settings, 12)
        first = top_p if not min_p and top_k in (0, -1, 12) else 1.0  # what top-p chooses from must be known as well
        ends = [len(naive_kept(row, top_k, first, min_p)) < most for row in (logits / temperature).tolist()]
        assert known.tolist() == ([True] * 9 if most == 12 else ends)
        assert (found.log_kept <= 0).all()
        for got, want in zip(found, scores, strict=True):
            torch.testing.assert_close(got[known].double(), want[known].double(), atol=1e-5, rtol=0)
    for i, row in enumerate((logits / temperature).tolist()):
        expected = naive_kept(row, top_k, top_p, min_p)
        assert kept[i].nonzero().squeeze(-1).tolist() == sorted(expected)
        target = int(targets[i])
        assert bool(scores.out_of_support[i]) == (target not in expected)
        law = sorted({*expected, target})
        mass = math.fsum(math.exp(row[j]) for j in law)
        logs = [row[j] - math.log(mass) for j in law]
        assert float(scores.logprobs[i]) == pytest.approx(row[target] - math.log(mass), abs=1e-9)
        assert float(scores.entropy[i]) == pytest.approx(-math.fsum(math.exp(x) * x for x in logs), abs=1e-9)
        whole = math.fsum(map(math.exp, row))
        assert float(scores.log_kept[i]) == pytest.approx(min(0.0, math.log(mass / whole)), abs=1e-9)


def test_penalties_token_by_token():
    """Repetition divides what is positive and multiplies what is not; frequency counts; presence does not."""
    logits = torch.tensor([[2.0, -2.0, 0.0, 3.0, -1.0]])
    seen = torch.tensor([[True, True, True, False, True]])
    counts = torch.tensor([[0.0, 1.0, 0.0, 0.0, 3.0]])

    def penalized(**settings):
        return penalize(logits, seen, counts, SamplingSettings(**settings))[0].tolist()

    assert penalized(repetition_penalty=2.0) == [1.0, -4.0, 0.0, 3.0, -2.0]
    assert penalized(frequency_penalty=0.5) == [2.0, -2.5, 0.0, 3.0, -2.5]
    assert penalized(presence_penalty=0.5) == [2.0, -2.5, 0.0, 3.0, -1.5]
    assert penalized(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25) == [
        1.0, -4.75, 0.0, 3.0, -3.75,
    ]  # fmt: skip
    assert penalized() == logits[0].tolist()


def test_penalties_come_before_the_temperature_and_the_truncation():
    logits = torch.tensor([[2.0, 1.5, 1.0]])
    seen, counts = torch.tensor([[True, False, False]]), torch.tensor([[1.0, 0.0, 0.0]])
    settings = SamplingSettings(presence_penalty=1.25, top_k=2)
    scores = replay(logits, torch.tensor([1]), settings, 0.5, seen, counts)
    assert float(scores.logprobs) == pytest.approx(3.0 - math.log(math.exp(3) + math.exp(2)), abs=1e-6)
    assert not scores.out_of_support
    assert replay(logits, torch.tensor([0]), settings, 0.5, seen, counts).out_of_support


def test_ties_at_the_edge_of_top_k_stay_and_one_of_those_of_top_p():
    equal = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert kept_mask(equal, SamplingSettings(top_k=2)).sum() == 3
    assert kept_mask(torch.zeros(1, 4), SamplingSettings(top_p=0.5)).sum() == 2
    assert kept_mask(torch.zeros(1, 4), SamplingSettings(top_p=0.01)).sum() == 1
    assert kept_mask(torch.zeros(1, 4), SamplingSettings(top_p=1e-9)).sum() == 1
    assert kept_mask(torch.zeros(1, 4), SamplingSettings(min_p=1.0)).sum() == 4


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)])
def test_what_reaches_top_p_exactly_is_enough(top_p, count):
    gaps, mass = torch.zeros(1, 4, dtype=torch.float64), torch.arange(1.0, 5.0, dtype=torch.float64)[None]
    assert cut(gaps, mass, settings_of(SamplingSettings(top_p=top_p), gaps)).tolist() == [[count]]
    assert kept_mask(gaps, SamplingSettings(top_p=top_p)).sum() == count


def test_without_top_p_a_token_without_mass_stays():
    gaps, mass = torch.tensor([[0.0, 0.0, 800.0]]).double(), torch.tensor([[1.0, 2.0, 2.0]]).double()
    assert cut(gaps, mass, settings_of(SamplingSettings(), gaps)).tolist() == [[3]]


@pytest.mark.parametrize(
    ("logits", "settings", "known"),
    [
        ([0.0, 0.0, 0.0, 0.0], SamplingSettings(top_p=0.5), False),  # which two stay is the sort's choice
        ([0.0, 0.0, 0.0, 0.0], SamplingSettings(top_k=2), True),  # all of them
        ([1.0, 0.0, 0.0, -1.0], SamplingSettings(top_p=0.5), True),
        ([1.0, 0.0, 0.0, -1.0], SamplingSettings(top_p=0.6), False),
        ([1.0, 0.0, 0.0, -1.0], SamplingSettings(top_k=2), True),
    ],
)
def test_a_set_that_ends_between_equals_is_not_known(logits, settings, known):
    top = torch.tensor([logits]).log_softmax(-1)
    assert replay_top(top, top[:, 1], settings, 4)[1].tolist() == [known]


def test_a_turn_is_what_one_request_sampled_and_begins_at_nothing():
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 0, 0, 0, 1], [0] * 8]).bool()
    run, place = turns(mask)
    assert run[mask].tolist() == [0, 0, 1, 1, 1, 2, 0, 0, 1]
    assert place[mask].tolist() == [0, 1, 0, 1, 2, 0, 0, 1, 0]
    assert run.min() == 0


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        (SamplingSettings(top_k=3), True),  # three of the five that are known
        (SamplingSettings(top_k=5), False),  # the sixth may be its equal
        (SamplingSettings(top_p=0.5), True),
        (SamplingSettings(top_p=0.9999), False),
        (SamplingSettings(min_p=0.5), True),
        (SamplingSettings(min_p=1e-9), False),
    ],
)
def test_the_most_likely_tokens_tell_the_kept_set_where_it_ends_among_them(settings, known):
    logits = torch.tensor([[3.0, 2.5, 2.0, 1.0, 0.5, 0.4, 0.3, -1.0]])
    top = logits.log_softmax(-1).topk(5).values
    target = torch.tensor([1])
    found, told = replay_top(top, top[:, 1], settings, 8)
    assert told.tolist() == [known]
    if known:
        for got, want in zip(found, replay(logits, target, settings, 1.0), strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
