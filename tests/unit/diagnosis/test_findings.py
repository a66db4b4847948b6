"""What probes hand on: frozen, declared, and the only way from one to another.

The trainer's side is a tiny model on the CPU; the engine's is a copy of it with other weights, behind the protocol.
"""

import copy
import math
import random
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import pytest
import torch
from support.diagnosed import B, Served

from trl_parity.diagnosis.diagnose import diagnose
from trl_parity.diagnosis.findings import NAMES, NOTHING, EnginePrompts, EngineWeights, Findings
from trl_parity.diagnosis.probes import PROBES, in_order, rescore, sampling_params
from trl_parity.diagnosis.probes.base import NotPossible, independent, probe
from trl_parity.diagnosis.selection import (
    RESAMPLES,
    Result,
    chance_in,
    confidence_in,
    mean,
    not_excluded,
    standard_error,
)
from trl_parity.engine.base import Capability
from trl_parity.engine.built_anew import Part
from trl_parity.engine.requests import Request
from trl_parity.records import Evidence


def seen(diagnosis):
    """The evidence, by probe, without what a clock measured."""
    return {e.name: replace(e, seconds=0.0).to_dict() for e in diagnosis.evidence}


def picked(*names):
    return [p for p in PROBES if p.name in names]


def test_findings_and_the_batch_are_frozen(make_batch):
    with pytest.raises(FrozenInstanceError):
        NOTHING.cache_moved = 0.1
    with pytest.raises(TypeError):
        NOTHING.lacking(["prefill"], "no engine").why_missing["prefill"] = ""
    batch = make_batch()
    for name in ("floor", "notes"):
        with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
            setattr(batch, name, {})


def test_newer_findings_count_and_what_is_missing_stays():
    prompts = EnginePrompts({0: [1, 2]})
    older = Findings(engine_prompts=prompts, cache_moved=0.1)
    both = older.plus(Findings(cache_moved=0.0))
    assert (both.engine_prompts, both.cache_moved) == (prompts, 0.0)
    assert both.found == {"engine_prompts", "cache_moved"}
    assert both.only(["cache_moved"]).found == {"cache_moved"}
    assert older.cache_moved == 0.1
    assert both.details() == {"cache_moved": 0.0}
    assert NOTHING.details() == {}


def test_each_probe_comes_after_the_givers_of_what_it_builds_on():
    assert in_order(PROBES) == PROBES
    given = set()
    for p in PROBES:
        assert set(p.needs) <= given, p.name
        given |= set(p.gives)
        assert set(p.uses) <= given, p.name
    assert given == NAMES  # and nothing is found that no probe gives


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        (
            ("prefix cache", "engine's state", "asked again"),
            "engine's prefill needs asked_again, which no probe before it gives",
        ),
        (("cache precision",), "engine's prefill uses cache_moved, which no probe before it gives"),
        (("context",), "prefix cache uses engine_prompts, which no probe before it gives"),
    ],
)
def test_an_order_without_a_giver_is_refused(left_out, words):
    with pytest.raises(ValueError, match=words):
        in_order([p for p in PROBES if p.name not in left_out])


def test_an_order_with_a_giver_that_comes_later_or_an_unknown_finding_is_refused():
    late = [replace(p, cost="last") if p.name == "engine's weights" else p for p in PROBES]
    late.append(late.pop(next(i for i, p in enumerate(late) if p.name == "engine's weights")))
    with pytest.raises(ValueError, match="uses engine_weights, which no probe before it gives"):
        in_order(late)
    with pytest.raises(ValueError, match="names findings that there are none of: phase_of_the_moon"):
        in_order([replace(PROBES[0], gives=("phase_of_the_moon",))])


def test_a_probe_sees_what_it_declares_and_gives_what_it_declares(make_batch):
    told = []

    def curious(batch, current, findings):
        told.append(findings.found)
        return None, Findings(cache_moved=0.5)

    batch, findings = make_batch(engine=False), Findings(cache_moved=0.1, engine_prompts=EnginePrompts({}))
    one = probe("curious", "unknown", "none", curious, "", "", uses=("cache_moved",), gives=("cache_moved",))
    assert one.look(batch, batch.start, findings) == (None, Findings(cache_moved=0.5))
    assert told == [{"cache_moved"}]
    with pytest.raises(TypeError, match="curious gives cache_moved, which it does not declare"):
        replace(one, gives=()).look(batch, batch.start, findings)
    with pytest.raises(NotPossible, match="no probe before it gave prefill"):
        replace(one, needs=("prefill",)).look(batch, batch.start, findings)
    assert len(told) == 2


@pytest.mark.slow_unit
def test_without_a_finding_it_needs_a_probe_is_not_possible(make_batch):
    alone = seen(diagnose(make_batch(), 1, probes=picked("engine's prefill")))
    assert alone["engine's prefill"]["error"] == "not possible here: no probe before it gave asked_again"
    too_long = seen(diagnose(make_batch(max_model_len=2), 1))
    for name in ("prefix cache", "asked again", "engine's prefill"):
        assert too_long[name]["error"] == "not possible here: no context fits the engine's max_model_len"
    silent = make_batch()
    silent.engine.next_token = lambda *args, **kwargs: 1 / 0
    errors = {name: e["error"] for name, e in seen(diagnose(silent, 1)).items()}
    assert errors["asked again"] == "ZeroDivisionError: division by zero"
    assert errors["engine's prefill"] == "not possible here: asked again failed: ZeroDivisionError: division by zero"


@pytest.mark.slow_unit
def test_what_was_found_before_a_refusal_is_handed_on(make_batch):
    batch = make_batch(began_healthy=None)
    batch.engine.caches_prefixes = False
    diagnosis = diagnose(batch, 1)
    found = seen(diagnosis)
    assert found["prefix cache"]["error"] == "not possible here: the engine keeps no prefix cache"
    assert batch.engine.calls == ["anew", "rescore"]  # each once, for three probes
    assert diagnosis.cause == "model_definition"
    assert "other ones, or another function of them" in found["engine's prefill"]["finding"]


@pytest.mark.slow_unit
def test_older_weights_of_an_engine_that_hands_out_none_are_named_from_what_probes_found(make_batch):
    batch, state = make_batch(), torch.random.get_rng_state()
    before = copy.deepcopy(batch.model.state_dict())
    diagnosis = diagnose(batch, 7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in batch.model.state_dict().items())
    assert diagnosis.cause == "stale_weights"
    assert "a server's parameters can't be read, and the run began healthy" in diagnosis.summary
    assert diagnosis.details["ladder"]["reproduced"]
    assert batch.engine.calls == ["cached", "anew", "rescore"]


@pytest.mark.slow_unit
def test_a_law_is_fitted_to_half_of_the_sequences_that_are_still_compared(make_batch):
    batch = make_batch()
    seen = []

    def fit(tokens, law):
        seen.append(len(tokens.targets))
        return replace(law, bias=((1, 0.5),))

    still = (batch.row != 2) & (batch.row != 4)
    held_out = replace(batch.start, kept=batch.start.kept & still)  # after a cause that was held out
    candidate = sampling_params._fitted(fit, held_out=True)(batch, held_out)
    assert seen[0] > 0
    assert set(batch.row[candidate.counterfactual.kept].tolist()) == {1, 5}  # of 0, 1, 3, 5


@pytest.mark.slow_unit
def test_without_an_alarm_only_what_chance_does_not_raise_over_the_floor_is_looked_into(make_batch):
    batch = make_batch()
    sums = batch.residual(batch.start)[0]
    error = standard_error(sums)
    above = mean(sums) - error  # a floor within two standard errors
    told = diagnose(replace(batch, floor=above), 1, alarmed=False)
    assert (told.cause, told.evidence) == ("unknown", ())
    assert "above the noise floor" in told.summary
    assert f"by no more than chance ({told.details['chance']:.2g}, once in 40) makes" in told.summary
    assert diagnose(replace(batch, floor=above), 1).evidence
    assert diagnose(replace(batch, floor=mean(sums) - 3.0 * error), 1, alarmed=False).evidence


@pytest.mark.parametrize(("draws", "copies"), [(3, 1), (4, 4), (30, 1)])
def test_chance_raises_a_mean_over_its_bound_in_one_of_forty_batches_however_few_the_draws(draws, copies):
    values = torch.randn(4000, draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = torch.stack([20.0 * values, torch.full_like(values, 20.0)], dim=-1).repeat(1, copies, 1)
    over = sum(mean(x) > chance_in(x, float(copies)) for x in sums) / len(sums)
    assert over == pytest.approx(0.025, abs=0.008)
    assert chance_in(sums[0], float(draws * copies)) == math.inf


@pytest.mark.slow_unit
def test_the_standard_error_of_a_residual_is_that_of_a_ratio_over_sequences():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 60, (4000, 20), generator=generator).double()
    levels = torch.rand(4000, 20, generator=generator, dtype=torch.float64) * 2.0
    sums = torch.stack([levels * counts, counts], dim=-1)
    told = sum(standard_error(x) for x in sums) / len(sums)
    assert told == pytest.approx(float(torch.tensor([mean(x) for x in sums]).std()), rel=0.1)
    assert standard_error(sums[0, :1]) == float("inf")


class WithPictures(Served):
    """One in this process that computes with older features of pictures wherever it keeps them."""

    capabilities = frozenset(Capability)
    caches_prefixes = False
    newer = None

    def next_token(self, contexts, targets, temperature, *, cached, features=False):
        served, self.served = self.served, self.served if cached or features else self.newer
        try:
            return super().next_token(contexts, targets, temperature, cached=cached)[0], torch.zeros(len(targets))
        finally:
            self.served = served


def test_features_of_pictures_from_older_weights_are_told_from_older_keys_and_values(make_batch, models):
    batch = make_batch()
    requests = [Request(temperature=1.0, pictures=[None] * B)]
    batch.capture.requests, batch.capture.output = requests, {"completion_ids": batch.rollout.completion_ids}
    batch = replace(
        batch, engine=WithPictures(models[1]), rollout=replace(batch.rollout, image_keys=torch.ones(B).long())
    )
    batch.engine.newer = models[0]
    candidate, found = rescore.prefix_cache(batch, batch.start, NOTHING)
    assert candidate.cause == "stale_encoder_cache"
    assert "read from features of pictures that it keeps" in candidate.finding
    torch.testing.assert_close(found.asked_again.as_sampled, batch.start.reported[found.asked_again.picked])


@pytest.mark.parametrize("matters", [False, True])
def test_what_its_answers_do_not_depend_on_is_no_state_of_the_engine(make_batch, models, monkeypatch, matters):
    batch = make_batch()
    batch = replace(batch, engine=WithPictures(models[1]))
    batch.engine.newer = models[1]
    owner = batch.engine if matters else SimpleNamespace()
    part = Part("newer", owner, "newer", models[1], models[0])
    monkeypatch.setattr(rescore, "built_anew", lambda *args: (None, frozenset()))
    monkeypatch.setattr(rescore, "parted", lambda *args: [part])
    batch.engine.model = None
    weights = EngineWeights(
        total=1, differing={}, ignored=(), arrived=1, missing=(), partial=False, coarse=False, rounded={},
        exchanged={}, values={},
    )  # fmt: skip
    candidate, found = rescore.engine_state(batch, batch.start, Findings(engine_weights=weights))
    assert found.engine_parts == (("newer",) if matters else ())
    assert (candidate is not None) == matters


@pytest.mark.slow_unit
def test_time_does_not_decide_what_is_true(make_batch):
    """Without any, nothing is named that a probe which was left out could overturn; with all, the same always."""
    hurried, unhurried = (diagnose(make_batch(), 7, budget=budget) for budget in (0.0, None))
    assert (hurried.cause, hurried.confidence) == ("unknown", 0.0)
    assert {"engine's weights", "engine's config", "prefix cache", "unpadded"} <= set(hurried.details["left_out"])
    assert hurried.summary.startswith("No name yet: the time for a diagnosis was over before ")
    assert "callback.diagnose()" in hurried.fix
    assert unhurried.cause == "stale_weights"
    assert "left_out" not in unhurried.details


@pytest.mark.slow_unit
@pytest.mark.parametrize(("began_healthy", "cause"), [(True, "stale_weights"), (None, "model_definition")])
def test_a_cause_by_elimination_is_as_sure_as_what_could_be_asked(make_batch, began_healthy, cause):
    """A server hands out neither its weights nor its module: what they would tell is not ruled out."""
    diagnosis = diagnose(make_batch(began_healthy=began_healthy), 7)
    assert diagnosis.cause == cause
    rivals = {"engine_state"} if began_healthy else {"engine_state", "stale_weights"}
    assert set(diagnosis.details["unasked"]) == rivals
    assert diagnosis.confidence == pytest.approx(1.0 / (1.0 + len(rivals)), abs=0.02)
    assert "Not asked, so not ruled out: engine_state" in diagnosis.summary


def test_what_leaves_nothing_unexplained_needs_no_other_answer():
    none = torch.zeros(RESAMPLES, dtype=torch.float64)
    evidence = Evidence(name="", cause="", hypothesis="", prediction="", cost="")
    [fit], [asked] = picked("fitted penalties"), picked("prefix cache")
    missing = Result(asked, None, asked.cause, 0.0, none, 0.0, evidence, unasked="failed")

    def confidence(share):
        best = Result(fit, None, "penalties", share, none + share, 0.0, evidence)
        rivals = not_excluded(best, [best, missing], frozenset())
        assert rivals == ("stale_prefix_cache",)
        return confidence_in(best, [best, missing], rivals)

    assert confidence(0.88) == pytest.approx(1.0 / (1.0 + 0.12 / 0.25))
    assert confidence(0.75) == pytest.approx(0.5)
    assert confidence(1.0) == 1.0
    answered = replace(missing, unasked="")
    assert not_excluded(replace(missing, cause="penalties"), [answered], frozenset()) == ()
    assert not_excluded(answered, [replace(missing, cause="stale_weights")], frozenset({"stale_weights"})) == ()


@pytest.mark.slow_unit
def test_a_cache_as_coarse_as_the_engines_is_handed_on(make_batch):
    diagnosis = diagnose(make_batch(kv_cache_dtype="fp8_e5m2"), 7)
    moved = seen(diagnosis)["cache precision"]["details"]["moved"]
    assert moved > 0
    assert diagnosis.details["cache_moved"] == moved


@pytest.mark.slow_unit
def test_the_order_of_independent_probes_changes_nothing(make_batch):
    free = [p for p in PROBES if not (p.needs or p.uses or p.gives)]
    bound = [p for p in PROBES if p not in free]
    assert len(free) >= 15
    random.Random(0).shuffle(free)
    probes = in_order(sorted(free + bound, key=lambda p: p in bound))
    assert [p.name for p in probes] != [p.name for p in PROBES]
    shuffled, usual = (diagnose(make_batch(), 1, probes=order) for order in (probes, PROBES))
    assert seen(shuffled) == seen(usual)
    assert shuffled.causes == usual.causes


def test_independent_probes_give_nothing(make_batch):
    batch = make_batch(engine=False)
    run = independent(lambda batch, current: None)
    assert run(batch, batch.start, NOTHING) == (None, NOTHING)
