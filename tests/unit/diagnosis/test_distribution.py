"""Sampling laws against dense fp64 oracles, and the fits on data drawn from a known law."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_parity.diagnosis.distribution import (
    Distribution,
    Tokens,
    describe,
    distribution_details,
    huber,
    improves,
    log_probs,
)
from trl_parity.diagnosis.fitting import (
    fit_penalty,
    fit_shift,
    fit_soft_cap,
    fit_temperature,
    fit_truncation,
    mle_temperature,
)
from trl_parity.diagnosis.fitting_bias import fit_bias, fit_min_tokens
from trl_parity.records import SamplingSettings
from trl_parity.scoring.sampling import kept_mask

FITS = (fit_temperature, fit_soft_cap, fit_truncation, fit_penalty, fit_bias, fit_min_tokens)
PLAIN = Distribution(sampling=SamplingSettings())


def oracle(tokens, law):
    """The processed logits (n, V) and kept set, token by token, fp64."""
    s, rows = law.sampling, []
    for i, logits in enumerate(tokens.logits):
        z = logits.to(law.logits_dtype or logits.dtype).double().clone()
        if law.curvature:
            c = 1 / abs(law.curvature)
            z = c * (z / c).tanh() if law.curvature > 0 else c * (z / c).atanh()
        for token, b in law.bias:
            z[token] += b
        if law.allowed is not None:
            z[[token for token in range(len(z)) if token not in law.allowed]] = -math.inf
        context = tokens.context[i][tokens.real[i]].tolist()
        output = tokens.context[i][tokens.output[i]].tolist()
        if len(output) < law.late_from:
            z[list(law.late)] = -math.inf
        for token in set(context):
            z[token] = z[token] / s.repetition_penalty if z[token] > 0 else z[token] * s.repetition_penalty
        for token in set(output):
            z[token] -= s.frequency_penalty * output.count(token) + s.presence_penalty
        rows.append(z / s.temperature)
    scaled = torch.stack(rows)
    return scaled, kept_mask(scaled, s)


def oracle_law(tokens, law):
    scaled, kept = oracle(tokens, law)
    return scaled.masked_fill(~kept, -math.inf).log_softmax(-1)


def at_targets(values, tokens):
    return values.gather(-1, tokens.targets.unsqueeze(-1)).squeeze(-1)


def make(law, seed=0, n=200, vocab=60, noise=0.02, corrupted=0.0, length=12, report=None):
    """Tokens drawn from ``law``, reported with noise; half of the rows are peaked, half are flat."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.where(torch.arange(n) % 2 == 0, 3.0, 1.2).unsqueeze(-1)
    logits = torch.randn(n, vocab, generator=g) * spread
    # contexts hold likely tokens, as texts do
    context = (logits / 2).softmax(-1).multinomial(length, replacement=True, generator=g)
    real = torch.arange(length) >= torch.randint(0, 4, (n, 1), generator=g)
    output = real & (torch.arange(length) >= length // 3)
    context = context.masked_fill(~real, 10**6)
    tokens = Tokens(logits, torch.zeros(n).long(), torch.zeros(n), context, real, output, torch.arange(n) // 8)
    tokens.targets = oracle_law(tokens, law).exp().multinomial(1, generator=g).squeeze(-1)
    reported = log_probs(tokens, report or law).logprobs
    reported += noise * torch.randn(n, generator=g)
    off = torch.rand(n, generator=g) < corrupted
    tokens.reported = reported + off * torch.randn(n, generator=g)
    return tokens


def of(**sampling):
    return Distribution(sampling=SamplingSettings(**sampling))


def residual(tokens, law):
    return float(huber(log_probs(tokens, law).logprobs - tokens.reported).mean())


def test_huber_is_quadratic_then_linear_and_capped():
    delta = torch.tensor([0.5, -1.0, 3.0, 1e9, math.inf, -math.inf, math.nan])
    assert huber(delta).tolist() == [0.125, 0.5, 2.5, 30.0, 30.0, 30.0, 30.0]


def test_a_single_token_is_no_improvement():
    before = torch.full((50,), 0.1)
    after = before.clone()
    after[7] = 0.0
    before[7] = 20.0
    assert not improves(before, after)
    assert improves(before, before * 0.85)
    assert not improves(torch.zeros(50), torch.zeros(50))


@given(
    seed=st.integers(0, 10_000),
    vocab=st.sampled_from([2, 17, 60]),
    sampling=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.3, 1.0, 2.5]),
            "top_k": st.sampled_from([0, -1, 1, 5, 60]),
            "top_p": st.sampled_from([1.0, 0.9, 0.4, 0.01]),
            "min_p": st.sampled_from([0.0, 0.05, 0.5]),
            "repetition_penalty": st.sampled_from([1.0, 0.7, 1.3]),
            "presence_penalty": st.sampled_from([0.0, 0.8, -0.5]),
            "frequency_penalty": st.sampled_from([0.0, 0.4, -1.0]),
        }
    ),
    bias=st.sampled_from([(), ((1, 2.5),), ((0, -math.inf), (1, -1.0))]),
    dtype=st.sampled_from([None, torch.bfloat16]),
    report=st.sampled_from(["processed_logprobs", "raw_logprobs", "processed_logits", "raw_logits"]),
)
@settings(max_examples=60, deadline=None)
def test_log_probs_are_the_oracles(seed, vocab, sampling, bias, dtype, report):
    law = Distribution(sampling=SamplingSettings(**sampling), bias=bias, logits_dtype=dtype, report=report)
    tokens = make(PLAIN, seed, n=8, vocab=vocab)
    g = torch.Generator().manual_seed(seed)
    tokens.targets = torch.randint(0, vocab, (8,), generator=g)
    scaled, kept = oracle(tokens, law)
    target = torch.nn.functional.one_hot(tokens.targets, vocab).bool()
    scores = log_probs(tokens, law)
    banned = scaled.isneginf()
    tie = (scaled == at_targets(scaled, tokens).unsqueeze(-1)).sum(
        -1
    ) > 1  # which of a tie is cut is the sort's choice
    assert torch.equal((scores.outside | tie), (~at_targets(kept, tokens) | tie))
    kept |= target & ~tie.unsqueeze(-1) & ~banned
    z = tokens.logits.to(dtype or torch.float32).double()
    expected = {
        "processed_logprobs": scaled - scaled.masked_fill(~kept, -math.inf).logsumexp(-1, keepdim=True),
        "raw_logprobs": z.log_softmax(-1),
        "processed_logits": scaled,
        "raw_logits": z,
    }[report]
    checked = ~(tie & scores.outside)
    torch.testing.assert_close(scores.logprobs[checked], at_targets(expected, tokens)[checked], rtol=1e-5, atol=2e-5)


def test_tokens_that_are_not_allowed_have_no_log_prob():
    law = replace(PLAIN, allowed=frozenset({1, 4, 9}))
    tokens = make(law)
    torch.testing.assert_close(log_probs(tokens, law).logprobs, at_targets(oracle_law(tokens, law), tokens))
    assert set(tokens.targets.tolist()) <= {1, 4, 9}
    tokens.targets[:] = 2
    assert log_probs(tokens, law).logprobs.isneginf().all()
    assert not log_probs(tokens, law).outside.any()


@pytest.mark.slow_unit
def test_large_vocabularies_in_many_chunks():
    law = of(temperature=0.8, top_p=0.9, min_p=0.001)
    tokens = make(law, n=30, vocab=40_000)
    torch.testing.assert_close(
        log_probs(tokens, law).logprobs, at_targets(oracle_law(tokens, law), tokens), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("vocab", [60, *(pytest.param(n, marks=pytest.mark.slow_unit) for n in (2000, 6000))])
@pytest.mark.parametrize(("true", "configured"), [(0.7, 1.0), (1.1, 1.0), (1.5, 0.6), (0.25, 1.0)])
def test_the_temperature_is_recovered(vocab, true, configured):
    tokens = make(of(temperature=true), vocab=vocab)
    found = fit_temperature(tokens, of(temperature=configured))
    assert found.sampling.temperature == pytest.approx(true, rel=0.01)
    noiseless = replace(tokens, reported=log_probs(tokens, of(temperature=true)).logprobs)
    found = fit_temperature(noiseless, of(temperature=configured))
    assert found.sampling.temperature == pytest.approx(true, rel=2e-4)


@pytest.mark.parametrize("vocab", [60, pytest.param(3000, marks=pytest.mark.slow_unit)])
@pytest.mark.parametrize("cap", [3.0, 8.0, 20.0, -16.0, -25.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_soft_cap_put_on_or_taken_off_is_recovered(cap, vocab, temperature):
    base = of(temperature=temperature)
    true = replace(base, curvature=1 / cap)
    tokens = make(true, vocab=vocab, noise=1e-3)
    found = fit_soft_cap(tokens, base)
    assert 1 / found.curvature == pytest.approx(cap, rel=0.05)
    assert residual(tokens, found) < 1e-5
    assert describe(found, base).endswith(f"a soft cap of {abs(1 / found.curvature):.3g} on the logits")
    assert describe(found, base).startswith("without") == (cap < 0)


def test_a_soft_cap_leaves_what_is_ruled_out_ruled_out():
    law = replace(PLAIN, curvature=0.2, bias=((3, -math.inf),))
    tokens = make(law, noise=0.0)
    assert not (tokens.targets == 3).any()
    torch.testing.assert_close(
        log_probs(tokens, law).logprobs, at_targets(oracle_law(tokens, law), tokens), atol=1e-5, rtol=0
    )
    assert fit_soft_cap(tokens, replace(law, curvature=0.0)).curvature == pytest.approx(0.2, rel=0.02)


def test_the_temperature_is_recovered_under_truncation():
    tokens = make(of(temperature=0.7, top_p=0.9, top_k=40))
    found = fit_temperature(tokens, of(temperature=1.0, top_p=0.9, top_k=40))
    assert found.sampling.temperature == pytest.approx(0.7, rel=0.01)
    assert (found.sampling.top_p, found.sampling.top_k) == (0.9, 40)


@pytest.mark.parametrize("vocab", [60, pytest.param(2000, marks=pytest.mark.slow_unit)])
@pytest.mark.parametrize(
    ("true", "tolerance"),
    [
        ({"top_p": 0.8}, 0.02), ({"top_p": 0.95}, 0.01), ({"top_k": 3}, 0), ({"top_k": 20}, 0), ({"min_p": 0.1}, 0.02),
        ({"top_k": 20, "temperature": 0.7}, 0), ({"top_p": 0.7, "repetition_penalty": 1.2}, 0.02),
    ],
)  # fmt: skip
def test_the_truncation_is_recovered(vocab, true, tolerance):
    law = of(**true)
    name = next(iter(true))
    base = replace(law, sampling=replace(law.sampling, **{name: getattr(PLAIN.sampling, name)}))
    tokens = make(law, vocab=vocab)
    found = fit_truncation(tokens, base)
    assert getattr(found.sampling, name) == pytest.approx(true[name], abs=tolerance)
    assert residual(tokens, found) < 0.001


def test_truncations_that_were_not_applied_are_left_out_and_another_one_is_replaced():
    tokens = make(PLAIN)
    assert fit_truncation(tokens, of(top_p=0.8)) == PLAIN
    assert fit_truncation(tokens, of(top_k=5)) == PLAIN
    assert fit_truncation(tokens, of(min_p=0.2)) == PLAIN
    found = fit_truncation(make(of(top_p=0.6, top_k=30)), of(top_p=0.9, top_k=30))
    assert found.sampling.top_p == pytest.approx(0.6, abs=0.02)
    assert found.sampling.top_k == 30


@pytest.mark.parametrize("vocab", [60, pytest.param(2000, marks=pytest.mark.slow_unit)])
@pytest.mark.parametrize(
    ("name", "true"),
    [
        ("repetition_penalty", 1.2), ("repetition_penalty", 0.8), ("presence_penalty", 0.7),
        ("presence_penalty", -0.6), ("frequency_penalty", 0.5), ("frequency_penalty", -0.4),
    ],
)  # fmt: skip
def test_the_penalty_is_recovered(vocab, name, true):
    tokens = make(of(**{name: true}), vocab=vocab)
    found = fit_penalty(tokens, PLAIN)
    assert getattr(found.sampling, name) == pytest.approx(true, abs=0.02)
    assert residual(tokens, found) < 0.001


def test_a_penalty_is_recovered_under_truncation_and_where_all_tokens_were_seen():
    tokens = make(of(repetition_penalty=1.3, top_p=0.9, temperature=0.8))
    found = fit_penalty(tokens, of(top_p=0.9, temperature=0.8))
    assert found.sampling.repetition_penalty == pytest.approx(1.3, abs=0.02)
    tokens = make(of(frequency_penalty=0.5), vocab=4, length=40)
    assert fit_penalty(tokens, PLAIN).sampling.frequency_penalty == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("vocab", [60, pytest.param(2000, marks=pytest.mark.slow_unit)])
def test_composition_is_found_one_after_the_other(vocab):
    tokens = make(of(temperature=0.7, repetition_penalty=1.15), vocab=vocab)
    law = fit_temperature(tokens, PLAIN)
    for fit in (fit_penalty, fit_temperature, fit_penalty, fit_temperature, fit_penalty):
        law = fit(tokens, law) or law
    assert law.sampling.temperature == pytest.approx(0.7, rel=0.03)
    assert law.sampling.repetition_penalty == pytest.approx(1.15, abs=0.03)
    assert residual(tokens, law) < 0.001


@pytest.mark.parametrize("vocab", [60, pytest.param(2000, marks=pytest.mark.slow_unit)])
@pytest.mark.parametrize("b", [-2.0, 1.5, 4.0])
def test_a_bias_is_recovered(vocab, b):
    true = replace(PLAIN, bias=((20, b),))
    tokens = make(true, vocab=vocab)
    tokens.logits[:, 20] += 3  # an id that matters
    tokens = remade(tokens, true)
    found = fit_bias(tokens, PLAIN)
    assert dict(found.bias)[20] == pytest.approx(b, abs=0.05)
    assert len(found.bias) == 1


def remade(tokens, law, noise=0.02, seed=1):
    """Targets and reports drawn anew, after a change of the logits."""
    g = torch.Generator().manual_seed(seed)
    targets = oracle_law(tokens, law).exp().multinomial(1, generator=g).squeeze(-1)
    tokens = replace(tokens, targets=targets)
    reported = log_probs(tokens, law).logprobs + noise * torch.randn(len(targets), generator=g)
    return replace(tokens, reported=reported)


def test_several_biases_are_recovered_under_a_temperature_and_a_penalty():
    true = replace(of(temperature=0.8, repetition_penalty=1.2), bias=((3, -1.5), (11, 2.0), (40, -math.inf)))
    tokens = make(PLAIN)
    tokens.logits[:, [3, 11, 40]] += 2
    tokens = remade(tokens, true)
    found = fit_bias(tokens, replace(true, bias=()))
    assert {i for i, _ in found.bias} == {3, 11, 40}
    assert dict(found.bias)[3] == pytest.approx(-1.5, abs=0.1)
    assert dict(found.bias)[11] == pytest.approx(2.0, abs=0.1)
    assert dict(found.bias)[40] == -math.inf
    assert fit_bias(tokens, replace(true, bias=((3, -1.5), (11, 2.0)))).bias[-1] == (40, -math.inf)


def test_bans_and_allow_lists_are_recovered():
    tokens = make(PLAIN)
    tokens.logits[:, [5, 6, 7, 8]] += 2
    bans = replace(PLAIN, bias=tuple((i, -math.inf) for i in (5, 6, 7, 8)))
    tokens = remade(tokens, bans)
    assert fit_bias(tokens, PLAIN) == bans
    for vocab in (60, 2000):
        allowed = replace(PLAIN, allowed=frozenset(range(3, 51, 4)))
        tokens = make(allowed, vocab=vocab)
        found = fit_bias(tokens, PLAIN)
        assert found.allowed == allowed.allowed
        assert found.bias == ()


def test_an_allowed_id_that_was_never_drawn_is_allowed_back():
    tokens = make(PLAIN)
    tokens.logits[:, 7] -= 3
    allowed = replace(PLAIN, allowed=frozenset({1, 2, 3, 4, 7}))
    tokens = remade(tokens, allowed, noise=0.002)
    tokens.targets = torch.where(tokens.targets == 7, 1, tokens.targets)
    tokens.reported = log_probs(tokens, allowed).logprobs
    assert fit_bias(tokens, PLAIN).allowed == allowed.allowed


@pytest.mark.slow_unit
@pytest.mark.parametrize(("vocab", "seed"), [(60, 0), (60, 1), pytest.param(2000, 2, marks=pytest.mark.slow_unit)])
def test_noise_alone_is_not_explained(vocab, seed):
    for law in (PLAIN, of(temperature=0.7, top_p=0.95, repetition_penalty=1.1)):
        tokens = make(law, seed, vocab=vocab)
        assert [fit(tokens, law) for fit in FITS] == [None] * len(FITS)
        exact = replace(tokens, reported=log_probs(tokens, law).logprobs)
        assert [fit(exact, law) for fit in FITS] == [None] * len(FITS)


@pytest.mark.parametrize("seed", range(3))
def test_corrupted_tokens_alone_are_not_explained(seed):
    tokens = make(PLAIN, seed, corrupted=0.2)
    assert [fit(tokens, PLAIN) for fit in FITS] == [None] * len(FITS)


@pytest.mark.slow_unit
@pytest.mark.parametrize("seed", range(3))
def test_corrupted_tokens_do_not_hide_the_law(seed):
    found = fit_temperature(make(of(temperature=0.6), seed, corrupted=0.2), PLAIN)
    assert found.sampling.temperature == pytest.approx(0.6, rel=0.08)
    found = fit_truncation(make(of(top_p=0.5), seed, corrupted=0.2), PLAIN)
    assert found.sampling.top_p == pytest.approx(0.5, abs=0.06)
    found = fit_penalty(make(of(repetition_penalty=1.6), seed, corrupted=0.2), PLAIN)
    assert found.sampling.repetition_penalty == pytest.approx(1.6, abs=0.15)
    true = replace(PLAIN, bias=((20, -math.inf),))
    tokens = make(PLAIN, seed, corrupted=0.2)
    tokens.logits[:, 20] += 5
    off = (torch.rand(200, generator=torch.Generator().manual_seed(seed)) < 0.2) * 0.7
    tokens = remade(tokens, true)
    tokens.reported += off * torch.randn(200, generator=torch.Generator().manual_seed(seed))
    assert (20, -math.inf) in fit_bias(tokens, PLAIN).bias


def test_other_reports_and_missing_contexts_are_not_fitted():
    tokens = make(of(temperature=0.5))
    assert [fit(tokens, replace(PLAIN, report="raw_logprobs")) for fit in FITS] == [None] * len(FITS)
    assert fit_penalty(replace(tokens, real=tokens.real & False, output=tokens.output & False), PLAIN) is None


def test_shifts_are_found_per_sequence():
    g = torch.Generator().manual_seed(0)
    law = -torch.rand(6, 30, generator=g) * 4
    reported = law + 0.02 * torch.randn(6, 30, generator=g)
    for row, s in enumerate((0, 1, -1, 2, -2)):
        reported[row] = reported[row].roll(s)
    mask = torch.ones(6, 30, dtype=torch.bool)
    mask[0, 20:] = False
    mask[5, 4:] = False
    reported[5] = reported[5].roll(2)  # 3 partners only
    assert fit_shift(reported, law, mask).tolist() == [0, 1, -1, 2, -2, 0]
    assert fit_shift(reported, law, mask, shifts=(2,)).tolist() == [0, 0, 0, 2, 0, 0]
    assert fit_shift(law[:, :3], law[:, :3], mask[:, :3]).tolist() == [0] * 6


@pytest.mark.parametrize("vocab", [60, pytest.param(2000, marks=pytest.mark.slow_unit)])
def test_sampled_tokens_tell_their_temperature(vocab):
    gaps = []
    for seed in range(5):
        tokens = make(of(temperature=0.8, repetition_penalty=1.2), seed, vocab=vocab)
        estimate, error = mle_temperature(tokens, of(temperature=1.0, repetition_penalty=1.2))
        assert 0.0 < error < 0.1
        gaps.append((estimate - 0.8) / error)
    assert max(map(abs, gaps)) < 3.0
    # drawn at 0.8, reported as if at 1: the reports say 1, the tokens don't
    raw = replace(PLAIN, report="raw_logprobs")
    tokens = make(of(temperature=0.6), vocab=vocab, report=raw)
    assert fit_temperature(tokens, of(temperature=0.6)).sampling.temperature == pytest.approx(1.0, rel=0.01)
    estimate, error = mle_temperature(tokens, PLAIN)
    assert estimate + 3 * error < 1.0
    assert abs(estimate - 0.6) < 3 * error


def test_the_likelihood_maximum_is_the_dense_one():
    tokens = make(of(temperature=0.8), vocab=6000, n=60)
    grid = torch.linspace(0.6, 1.1, 2001, dtype=torch.float64).tolist()
    likelihood = [at_targets((tokens.logits.double() / t).log_softmax(-1), tokens).sum() for t in grid[::40]]
    coarse = grid[40 * int(torch.stack(likelihood).argmax())]
    assert mle_temperature(tokens, of(temperature=0.7))[0] == pytest.approx(coarse, abs=0.01)


def test_no_standard_error_without_a_maximum_or_sequences():
    tokens = make(PLAIN)
    assert mle_temperature(replace(tokens, sequence=tokens.sequence * 0), PLAIN)[1] == math.inf
    assert mle_temperature(replace(tokens, targets=tokens.logits.argmax(-1)), PLAIN)[1] == math.inf


def test_laws_in_words_and_json():
    base = of(temperature=0.7)
    law = Distribution(
        sampling=SamplingSettings(temperature=1.05, top_p=0.8, repetition_penalty=1.1),
        bias=((3, -math.inf), (17, -math.inf), (20, -2.0)),
        allowed=frozenset(range(12)),
        report="raw_logprobs",
        logits_dtype=torch.bfloat16,
    )
    assert describe(base, base) == ""
    assert describe(law, base) == (
        "temperature 1.05 (configured 0.7), top_p 0.80, repetition_penalty 1.10, bias -2.00 on token 20, "
        "tokens 3, 17 never drawn, only 12 token ids allowed, logits rounded to bfloat16, "
        "raw log-probs (T = 1, unprocessed)"
    )
    assert describe(of(top_p=1.0), of(top_p=0.9)) == "no top_p (configured 0.90)"
    assert describe(of(top_k=5), of(top_k=20)) == "top_k 5 (configured 20)"
    details = json.loads(json.dumps(distribution_details(law), allow_nan=False))
    assert details["bias"] == [[3, "-inf"], [17, "-inf"], [20, -2.0]]
    assert details["allowed"] == list(range(12))
    assert (details["temperature"], details["logits_dtype"]) == (1.05, "bfloat16")


@pytest.mark.parametrize("late", [(7,), (7, 19)])
def test_min_tokens_are_recovered(late):
    """The ids that end a sequence, likely and ruled out before the sixth token."""
    law = replace(PLAIN, late=late, late_from=5)
    tokens = make(law, n=400, length=9, noise=0.002, seed=3)
    tokens.output = tokens.real & (torch.arange(9) >= 9 - torch.arange(400).unsqueeze(-1) % 10)
    for seed, lift in enumerate(late):
        tokens.logits[:, lift] += 4.0 - 0.2 * seed
    tokens.targets = (
        oracle_law(tokens, law).exp().multinomial(1, generator=torch.Generator().manual_seed(1)).squeeze(-1)
    )
    tokens.reported = at_targets(oracle_law(tokens, law), tokens) + 0.002 * torch.randn(
        400, generator=torch.Generator().manual_seed(2)
    )
    found = fit_min_tokens(tokens, PLAIN)
    assert (found.late, found.late_from) == (late, 5)
    told = describe(found, PLAIN)
    assert told == f"token{'s' * (len(late) > 1)} {', '.join(map(str, late))} never among the first 5"
    assert describe(found, PLAIN, ids=False) == f"{len(late)} token id(s) never among the first 5"
    assert json.loads(json.dumps(distribution_details(found)))["late"] == {"ids": list(late), "from": 5}
    assert fit_min_tokens(tokens, found) is None  # and nothing more


@pytest.mark.parametrize("drawn", [True, False])
def test_min_tokens_end_where_the_numbers_say_not_where_an_id_first_appears(drawn):
    """A dozen draws of the id are expected before the sixth token; after it, none came up for a while, or at all."""
    law = replace(PLAIN, late=(7,), late_from=5)
    tokens = make(law, n=400, length=9, noise=0.002, seed=3)
    tokens.output = tokens.real & (torch.arange(9) >= 9 - torch.arange(400).unsqueeze(-1) % 10)
    tokens.logits[:, 7] += 1.5
    before, generator = tokens.output.sum(-1), torch.Generator().manual_seed(1)
    never = replace(law, late_from=8 if drawn else 99)  # what happens to be drawn
    tokens.targets = oracle_law(tokens, never).exp().multinomial(1, generator=generator).squeeze(-1)
    tokens.reported = at_targets(oracle_law(tokens, law), tokens)
    assert (int(before[tokens.targets == 7].min()) >= 8) if drawn else not (tokens.targets == 7).any()
    found = fit_min_tokens(tokens, PLAIN)
    assert (found.late, found.late_from) == ((7,), 5)


def test_a_ban_that_the_numbers_speak_for_wants_fewer_draws_expected():
    law = replace(PLAIN, late=(7,), late_from=5)
    tokens = make(law, n=200, length=9, noise=0.0, seed=3)
    tokens.output = tokens.real & (torch.arange(9) >= 9 - torch.arange(200).unsqueeze(-1) % 10)
    early = tokens.output.sum(-1) < 5
    p = oracle_law(tokens, PLAIN).exp()[:, 7]
    tokens.logits[:, 7] -= (p * early).sum().log().item() - math.log(1.6)
    expected = float(oracle_law(tokens, PLAIN).exp()[early, 7].sum())
    assert 1.0 < expected < 3.0
    tokens.targets = oracle_law(tokens, replace(law, late_from=8)).argmax(-1)
    tokens.targets[-1], tokens.output[-1] = 7, tokens.real[-1]
    tokens.reported = at_targets(oracle_law(tokens, law), tokens)
    assert fit_min_tokens(tokens, PLAIN).late == (7,)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(2))
    tokens.reported = at_targets(oracle_law(tokens, PLAIN), tokens) + 0.05 * noise
    assert fit_min_tokens(tokens, PLAIN) is None


def test_a_first_appearance_by_chance_is_no_rule():
    assert fit_min_tokens(make(PLAIN, n=400, length=9), PLAIN) is None
