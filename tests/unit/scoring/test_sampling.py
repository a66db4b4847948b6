"""The replay of vLLM's sampling semantics, against vLLM's own functions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sampling import vllm_kept

from trl_parity.records import SamplingSettings
from trl_parity.scoring.sampling import candidates, kept_mask, penalize, replay, replay_top


def logits_of(seed, rows=6, vocab=40, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * spread


@given(
    seed=st.integers(0, 10_000),
    top_k=st.sampled_from([0, 1, 3, 39, 40]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
@settings(max_examples=120, deadline=None)
@pytest.mark.slow_unit
def test_the_kept_set_is_vllms(seed, top_k, top_p, min_p):
    sampling = SamplingSettings(top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits_of(seed)
    assert torch.equal(kept_mask(logits, sampling), vllm_kept(logits, sampling))


@pytest.mark.parametrize(
    ("repetition", "presence", "frequency"), [(1.3, 0, 0), (1, 0.7, 0), (1, 0, 0.4), (0.8, -0.5, 1.1)]
)
@pytest.mark.slow_unit
def test_penalties_are_vllms(repetition, presence, frequency):
    from vllm.model_executor.layers.utils import apply_penalties

    rows, vocab = 5, 30
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, vocab, (rows, 7), generator=generator)
    output = torch.randint(0, vocab, (rows, 9), generator=generator)
    logits = logits_of(1, rows, vocab)
    expected = apply_penalties(
        logits.clone(),
        prompt,
        output,
        torch.full((rows,), float(presence)),
        torch.full((rows,), float(frequency)),
        torch.full((rows,), float(repetition)),
    )
    counts = torch.zeros(rows, vocab).scatter_add_(1, output, torch.ones(output.shape))
    seen = (counts > 0) | (torch.zeros(rows, vocab).scatter(1, prompt, 1.0) > 0)
    sampling = SamplingSettings(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    torch.testing.assert_close(penalize(logits, seen, counts, sampling), expected)


@pytest.mark.parametrize("sampling", [SamplingSettings(top_p=0.8), SamplingSettings(top_k=5, min_p=0.02)])
@pytest.mark.slow_unit
def test_replayed_logprobs_are_the_processed_logprobs_of_vllms_sampler(sampling):
    temperature, logits = 0.7, logits_of(3)
    kept = vllm_kept(logits / temperature, sampling)
    processed = (logits / temperature).masked_fill(~kept, -torch.inf).log_softmax(-1)
    target = kept.float().multinomial(1, generator=torch.Generator().manual_seed(0)).squeeze(-1)
    scores = replay(logits, target, sampling, temperature)
    torch.testing.assert_close(scores.logprobs, processed.gather(-1, target.unsqueeze(-1)).squeeze(-1))
    mass = ((logits / temperature).softmax(-1) * kept).sum(-1)
    torch.testing.assert_close(scores.log_kept.exp(), mass)
    assert not scores.out_of_support.any()


def test_a_token_outside_the_trainers_kept_set_is_counted_and_stays_finite():
    logits = logits_of(4)
    scores = replay(logits, logits.argmin(-1), SamplingSettings(top_k=3), 1.0)
    assert scores.out_of_support.all()
    assert torch.isfinite(scores.logprobs).all()


def test_penalties_without_the_context_are_refused():
    with pytest.raises(ValueError, match="seen so far"):
        replay(logits_of(0), torch.zeros(6, dtype=torch.long), SamplingSettings(presence_penalty=1.0), 1.0)


@pytest.mark.slow_unit
@given(
    seed=st.integers(0, 10_000),
    most=st.sampled_from([1, 2, 7, 20, 40]),
    top_k=st.sampled_from([0, 1, 3, 19, 40]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    spread=st.sampled_from([0.0, 0.5, 2.0, 8.0]),
    coarse=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_the_most_likely_tokens_tell_the_same_or_that_they_do_not_know(
    seed, most, top_k, top_p, min_p, spread, coarse
):
    sampling = SamplingSettings(top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits_of(seed, spread=spread)
    logits = logits.round() if coarse else logits  # equal logits
    targets = torch.randint(0, 40, (6,), generator=torch.Generator().manual_seed(seed))
    expected = replay(logits, targets, sampling, 1.0)
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(max(most, min(top_k + 1, 40))).values
    found, known = replay_top(top, logprobs.gather(-1, targets[:, None])[:, 0], sampling, 40)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got[known], want[known], atol=1e-5, rtol=0)
    before_top_p = sampling if not min_p and top_k in (0, 40) else replace(sampling, top_p=1.0)
    ends = kept_mask(logits, before_top_p).sum(-1) < top.shape[1]
    if not coarse and spread:
        assert known[ends | (top.shape[1] == 40)].all()  # whenever it can be known, it is


@pytest.mark.parametrize("most", [7, 40])
def test_a_token_whose_log_probs_are_not_numbers_stays_without_one(most):
    top = logits_of(0).log_softmax(-1).sort(-1, descending=True).values[:, :most]
    top[2] = torch.nan
    for sampling in (SamplingSettings(top_p=0.9), SamplingSettings(top_k=3), SamplingSettings(min_p=0.1, top_p=0.9)):
        scores = replay_top(top, top[:, 0], sampling, 40)[0]
        assert scores.logprobs.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingSettings(top_p=0.9), (64, 1024)),
        (SamplingSettings(top_k=20, top_p=0.9), (64,)),
        (SamplingSettings(top_k=200), (201,)),
        (SamplingSettings(top_k=5000), ()),
        (SamplingSettings(top_k=-1, min_p=0.1), (64, 1024)),
        (SamplingSettings(top_p=0.9, presence_penalty=1.0), ()),
    ],
)
def test_how_many_of_the_most_likely_tokens_are_looked_at(sampling, expected):
    assert candidates(sampling, 50_000) == expected
    assert candidates(sampling, 50) == ((50,) if expected or sampling.top_k > 50 else ())
