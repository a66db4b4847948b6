"""The replay of sampling settings against loops over tokens: no vLLM, each number by its rule."""

import math

import pytest
import torch

from trl_parity.records import SamplingSettings
from trl_parity.scoring.sampling import kept_mask, penalize, replay, replay_top


def naive_kept(row, top_k, top_p, min_p):
    """min-p of the whole law, then top-k, then top-p of what is left; indices that stay."""
    total = math.fsum(math.exp(z) for z in row)
    probs = [math.exp(z) / total for z in row]
    kept = [i for i, p in enumerate(probs) if p >= min_p * max(probs)]
    if 0 < top_k < len(row):
        least = sorted((row[i] for i in kept), reverse=True)[:top_k][-1]
        kept = [i for i in kept if row[i] >= least]
    if top_p < 1:
        rest = math.fsum(math.exp(row[i]) for i in kept)
        order, mass = sorted(kept, key=lambda i: row[i]), 0.0
        for i in order[:-1]:
            mass += math.exp(row[i]) / rest
            if mass > 1 - top_p:
                break
            kept.remove(i)
    return kept


@pytest.mark.parametrize("top_k", [0, -1, 1, 4, 11, 12])
@pytest.mark.parametrize("top_p", [1.0, 0.93, 0.6, 0.05])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3])
def test_what_is_kept_and_what_it_is_scored(top_k, top_p, min_p):
    logits = torch.randn(9, 12, generator=torch.Generator().manual_seed(top_k + 5), dtype=torch.float64) * 2
    settings, temperature = SamplingSettings(top_k=top_k, top_p=top_p, min_p=min_p), 0.8
    kept = kept_mask(logits / temperature, settings)
    targets = torch.arange(9) % 12
    scores = replay(logits, targets, settings, temperature)
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
    assert kept_mask(torch.zeros(1, 4), SamplingSettings(min_p=1.0)).sum() == 4


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
