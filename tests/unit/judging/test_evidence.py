"""Evidence over a run: decided where there is a fault that matters, silent where there is none, whatever the tails."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from trl_parity.judging.betting import SHARES, Bets, honesty_bets, normal_score, score_bets
from trl_parity.judging.evidence import TESTS, Evidence, Past
from trl_parity.verdict import MismatchStats, Status, Verdict

SCALE, TOKENS, SEQUENCES = 0.02, 1000, 32  # of Δ, nats


def window(rng, *, level=1.0, bias=0.0, floor=True, glitch=0.0, uneven=0.05, rare=0.2, withheld=0.0):
    """What a window of honest tokens records: E[w] = 1 exactly, but for ``bias``; mean |Δ| 0.016, k3 2e-4.

    A token is the likely one or, with probability ``rare``, one of 50; of these ``withheld`` are never drawn.
    """
    s = SCALE * level * math.exp(uneven * rng.standard_normal())
    delta = rng.normal(-(s**2) / 2 + bias, s, TOKENS)
    trimmed = delta.copy()
    if glitch:
        delta[0] = glitch
        trimmed = delta[1:]
    x = np.minimum(np.exp(delta), 2.0) - 1.0
    values = {
        "ratio/clipped": 1.0 + x.mean(),
        "ratio/clipped_square": (x * x).mean(),
        "kl_k1": -delta.mean(),
        "trimmed/logp_abs_diff/mean": np.abs(trimmed).mean(),
        "trimmed/kl_k3": (np.expm1(trimmed) - trimmed).mean(),
    }
    entropy = -(1 - rare) * math.log1p(-rare) + rare * math.log(50 / rare)
    drawn = rng.random(TOKENS) < rare * (1 - withheld)
    values |= {"entropy/trainer": entropy}
    values |= {"entropy/drift": entropy - np.where(drawn, math.log(50 / rare), -math.log1p(-rare)).mean()}
    if floor:
        values |= {"floor/logp_abs_diff/mean": 0.016, "floor_upper/logp_abs_diff/mean": 0.018}
        values |= {"floor/kl_k3": 2e-4, "floor_upper/kl_k3": 2.5e-4}
    return {name: float(value) for name, value in values.items()}


def watch(evidence, windows, first=0):
    """The highest evidence of each test over the windows, and the first step at which one decides."""
    highest, decision = dict.fromkeys(TESTS, -math.inf), None
    for step, values in enumerate(windows, first):
        evidence.update(step, TOKENS, SEQUENCES, values)
        for test in TESTS:
            highest[test] = max(highest[test], evidence.bets[test].log10_evidence)
        if decision is None and evidence.decided:
            decision = step
    return highest, decision


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---- the bets -----------------------------------------------------------------------------------------------------


def test_the_recursion_is_the_sum_over_all_start_times(rng):
    log_factors = rng.normal(-0.2, 1.5, (30, 3))
    bets = Bets(3, 0.25)
    for t, row in enumerate(log_factors):
        bets.update(t, row, row)

    def waiting(t):
        return math.log(2) / math.log(1 + t)

    total = 0.0
    for k in range(3):
        for start in range(30):
            wealth = waiting(start + 1) - waiting(start + 2)
            for x in log_factors[start:, k]:
                wealth *= min(math.exp(x), 100.0)
            total += wealth / 3
    assert bets.log10_evidence == pytest.approx(math.log10(0.25 * (total + waiting(31))), rel=1e-12)


def test_all_the_wealth_is_there_before_the_first_window_and_fair_bets_keep_it():
    bets = Bets(2)
    assert bets.log10_evidence == pytest.approx(0.0)
    for step in range(50):
        bets.update(step, np.zeros(2), np.zeros(2))
    assert bets.log10_evidence == pytest.approx(0.0)
    for step, factor in ((50, 1.05), (51, 2.0)):
        bets.update(step, np.log([factor, factor]), np.full(2, step))
    assert bets.best()[1:] == (50, 50.5)  # a fair bet does not rise, a little better one does


def test_honesty_bets_lie_below_the_product_of_bets_on_tokens(rng):
    w = np.exp(rng.normal(0.0, 0.6, 500))
    x = np.minimum(w, 2.0) - 1.0
    found = honesty_bets(500, x.mean(), (x * x).mean(), 0.01, 0.002)
    above = [sum(math.log1p(b * (a - 0.002) / 1.002) for a in x) for b in SHARES]
    below = [sum(math.log1p(b * (-a - 0.01) / 1.01) for a in x) for b in SHARES]
    assert (found <= np.array(above + below) + 1e-9).all()


@pytest.mark.parametrize("low_ratio", [0.0, 0.3, 0.9, 0.999])
def test_the_mean_of_an_honesty_factor_is_at_most_one(low_ratio):
    """Exactly, over the two values a ratio of mean 1 takes: low_ratio or 2."""
    chance = (1.0 - low_ratio) / (2.0 - low_ratio)
    factors = [np.exp(honesty_bets(1, w - 1.0, (w - 1.0) ** 2, 0.0, 0.0)) for w in (low_ratio, 2.0)]
    assert ((1 - chance) * factors[0] + chance * factors[1] <= 1.0 + 1e-12).all()


def test_what_clipping_takes_is_bounded_by_the_kl():
    w = np.exp(np.linspace(-5, 40, 200_001))
    assert (np.maximum(w - 2.0, 0.0) <= 1.26 * (w - 1.0 - np.log(w))).all()


def test_normal_scores_are_the_normal_quantiles_and_never_further_out():
    t = np.linspace(-20, 20, 81)
    for dof in (1.0, 4.0, 7.0, 31.0, 199.0):
        upper = np.abs(t)
        exact = stats.norm.isf(stats.t.sf(upper, dof))
        found = np.abs(normal_score(t, np.full_like(t, dof)))
        assert (found <= exact + 0.01).all()
        assert (found >= exact - (0.15 if dof == 1 else 0.08)).all()


def test_score_factors_have_mean_one_under_students_t_and_an_unknown_t_is_no_bet():
    dof = 7.0
    t = stats.t.ppf((np.arange(20_000) + 0.5) / 20_000, dof)
    means = np.exp(score_bets(t[:, None], np.array(dof))).mean(0)
    assert (means <= 1.001).all()
    assert (means >= 0.85).all()  # the outermost bet lives on tails a sample of quantiles lacks
    assert not score_bets(np.array([math.nan]), np.array(3.0)).any()


def test_a_runs_past_is_its_plain_moments_and_correlation_lengthens_the_spread(rng):
    past = Past((1,))
    y = rng.normal(3.0, 0.5, 60)
    for x in y:
        past.add(np.array([x]), np.array([True]))
    known = int(past.n[0])
    assert known == 50  # the last ten wait
    assert past.mean[0] == pytest.approx(y[:50].mean(), abs=0.02)
    assert past.var[0] == pytest.approx(y[:50].var(), rel=0.1)
    assert past.spread[0] >= y[:50].std(ddof=1) * 0.95
    level, slow = 0.0, Past((1,))
    for x in rng.normal(0.0, 1.0, 400):
        level = 0.8 * level + 0.6 * x
        slow.add(np.array([level]), np.array([True]))
    assert slow.spread[0] > 2.0


def test_a_run_that_is_not_calm_teaches_its_past_nothing():
    past = Past((1,))
    for x in (1.0, 2.0, 1.5, 1.2):
        past.add(np.array([x]), np.array([True]))
    before = past.state()["moments"]
    for _ in range(20):
        past.add(np.array([9.0]), np.array([False]))
    assert past.state()["moments"] == before


# ---- healthy runs -------------------------------------------------------------------------------------------------


def test_a_healthy_run_is_silent(rng):
    highest, decision = watch(Evidence(), (window(rng) for _ in range(150)))
    assert decision is None
    assert max(highest.values()) < 1.0


def test_a_bias_and_a_drift_too_small_to_matter_never_decide(rng):
    windows = (window(rng, bias=0.0015, level=1.05) for _ in range(150))
    highest, decision = watch(Evidence(), windows)
    assert decision is None
    assert max(highest.values()) < 1.0


@pytest.mark.parametrize(("upper", "honest"), [(4e-3, True), (1e-4, False)])
def test_what_clipping_takes_from_a_heavy_tail_is_no_dishonesty_within_the_floors_kl(upper, honest):
    """Ratios of mean 1, of which 1.5 in 10,000 are 30: clipped, their mean is 0.9958. k3 is 0.004."""
    chance, low = 1.5e-4, (1 - 30 * 1.5e-4) / (1 - 1.5e-4)
    values = {
        "ratio/clipped": 2 * chance + low * (1 - chance),
        "ratio/clipped_square": chance + (low - 1) ** 2 * (1 - chance),
        "floor_upper/kl_k3": upper,
    }
    _, decision = watch(Evidence(), [values] * 100)
    assert (decision is None) == honest


def test_a_short_stretch_over_the_limit_is_no_drift_however_small_its_standard_error():
    values = {"trimmed/logp_abs_diff/mean": 0.025, "trimmed/kl_k3": 4e-4}  # limits 0.0225 and 3.5e-4
    values |= {"se/logp_abs_diff/mean": 1e-5, "se/kl_k3": 1e-7}
    values |= {"floor_upper/logp_abs_diff/mean": 0.018, "floor_upper/kl_k3": 2.5e-4}
    highest, _ = watch(Evidence(), [values] * 8)
    assert highest["drift"] < 1.5


@pytest.mark.parametrize("rare", [0.9, 0.05, 0.003, 0.001])
def test_tokens_of_the_trainers_law_are_as_surprising_as_it_says_however_seldom_one_is(rng, rare):
    """At 0.001 a third of the windows have none of the unlikely tokens, and no spread to tell of."""
    for size in (1.0, 0.1):
        evidence, highest = Evidence(), -math.inf
        for step in range(150):
            many = int(TOKENS * size)
            drawn = rng.random(many) < rare
            entropy = -(1 - rare) * math.log1p(-rare) + rare * math.log(50 / rare)
            drift = entropy - np.where(drawn, math.log(50 / rare), -math.log1p(-rare))
            error = drift.std() / math.sqrt(many)
            values = {"entropy/drift": drift.mean(), "se/entropy/drift": error, "entropy/trainer": entropy}
            evidence.update(step, many, SEQUENCES, values)
            highest = max(highest, evidence.bets["entropy"].log10_evidence)
        assert highest < 1.0


def test_a_sample_that_has_none_of_a_peaked_laws_rare_tokens_decides_nothing():
    """One token in 300 has all of the entropy, 12 nats; none of the 16 that were scored is among them."""
    values = {"entropy/drift": -0.04, "se/entropy/drift": 0.009, "entropy/trainer": 0.001}
    sampled, full = Evidence(), Evidence()
    for step in range(30):
        sampled.update(step, 8192, SEQUENCES, values | {"cost/coverage": 16 / 8192})
        full.update(step, 8192, SEQUENCES, values | {"cost/coverage": 1.0})
    assert "entropy" in full.decided
    assert sampled.decided == ()
    assert not sampled.suspects_entropy


def test_a_sample_without_a_standard_error_says_nothing_of_the_entropy():
    every, some = Evidence(), Evidence()
    for step in range(20):
        values = {"entropy/drift": 0.01 * (step % 2) if step < 10 else 0.3, "entropy/trainer": 1.0}
        every.update(step, TOKENS, SEQUENCES, values)
        some.update(step, TOKENS, SEQUENCES, values | {"cost/coverage": 1.0 if step < 10 else 0.1})
    assert "entropy" in every.decided
    assert every.suspects_entropy
    assert some.bets["entropy"].windows == every.bets["entropy"].windows - 10
    assert not some.suspects_entropy


def test_a_withheld_token_is_decided_from_samples_too(rng):
    evidence, values = Evidence(), {"entropy/drift": 0.2, "se/entropy/drift": 0.03, "entropy/trainer": 1.0}
    for step in range(30):
        evidence.update(step, TOKENS, SEQUENCES, values | {"cost/coverage": 0.25})
    assert evidence.decided == ("entropy",)


def test_laws_that_are_apart_may_differ_in_entropy_as_much(rng):
    far = {"entropy/drift": 0.07, "se/entropy/drift": 0.005, "entropy/trainer": 1.0}
    near, lagging = Evidence(), Evidence()
    for step in range(60):
        near.update(step, TOKENS, SEQUENCES, far | {"trimmed/logp_abs_diff/mean": 0.001})
        lagging.update(step, TOKENS, SEQUENCES, far | {"trimmed/logp_abs_diff/mean": 0.06})
    assert "entropy" in near.decided
    assert lagging.decided == ()


@pytest.mark.parametrize("glitch", [20.0, -20.0])
def test_one_ratio_of_e20_neither_decides_nor_blinds(rng, glitch):
    evidence = Evidence()
    windows = (window(rng, glitch=glitch if step in (30, 70) else 0.0) for step in range(100))
    highest, decision = watch(evidence, windows)
    assert decision is None
    assert max(highest.values()) < 1.0
    _, decision = watch(evidence, (window(rng, bias=0.006) for _ in range(30)), first=100)
    assert decision is not None
    assert "honesty" in evidence.decided


def test_one_window_decides_nothing_whatever_it_holds(rng):
    evidence = Evidence()
    watch(evidence, (window(rng) for _ in range(60)))
    highest, decision = watch(evidence, [window(rng, level=1000.0, bias=5.0)], first=60)
    assert decision is None
    assert max(highest.values()) < 2.0


def test_false_alarms_at_the_very_limit_stay_below_alpha(rng):
    """1,000 runs whose mean |Δ| and k3 are at what the floor allows, the worst case of the null hypothesis."""
    runs = 1000
    evidence = Evidence(shape=(runs,))
    reached = np.zeros(runs, dtype=bool)
    upper = {"logp_abs_diff/mean": 0.02, "kl_k3": 8e-4}
    for step in range(40):
        values = {"kl_k1": np.zeros(runs)}
        for stat, bound in upper.items():
            limit = max(1.25 * bound, bound + {"kl_k3": 1e-4}.get(stat, 0.001))
            error = 0.1 * limit * np.sqrt(rng.chisquare(7, runs) / 7)
            values |= {
                f"trimmed/{stat}": limit * np.exp(0.1 * rng.standard_normal(runs)),
                f"se/{stat}": error,
                f"floor_upper/{stat}": np.full(runs, bound),
            }
        evidence.update(step, np.full(runs, 400.0), np.full(runs, 8.0), values)
        reached |= evidence.bets["drift"].log10_evidence >= math.log10(20)
    assert reached.mean() <= 0.05 / 4


# ---- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "side"), [(0.006, "mean ratio above 1"), (-0.006, "mean ratio below 1")])
def test_a_faint_bias_of_the_ratio_is_dishonest_from_its_onset(rng, bias, side):
    evidence = Evidence()
    watch(evidence, (window(rng) for _ in range(100)))
    _, decision = watch(evidence, (window(rng, bias=bias) for _ in range(30)), first=100)
    assert decision is not None
    assert "honesty" in evidence.decided
    found = evidence.finding("honesty")
    assert found.statistic == side
    assert abs(found.onset - 100) <= 3
    assert found.level == pytest.approx(1 + bias, abs=0.001)


@pytest.mark.parametrize(("withheld", "side"), [(0.2, "below"), (-0.2, "above")])
def test_tokens_that_are_never_drawn_are_missed_though_both_sides_give_the_same_log_probs(rng, withheld, side):
    evidence = Evidence()
    watch(evidence, (window(rng) for _ in range(40)))
    _, decision = watch(evidence, (window(rng, withheld=withheld) for _ in range(25)), first=40)
    assert decision is not None
    assert evidence.decided == ("entropy",)
    found = evidence.finding("entropy")
    assert found.statistic == f"surprisal {side} the entropy"
    assert abs(found.onset - 40) <= 3
    assert found.level == pytest.approx(withheld * 0.2 * (math.log(50 / 0.2) + math.log1p(-0.2)), rel=0.3)


def test_equal_rows_say_little_of_the_entropy():
    values = {"entropy/drift": 0.3, "se/entropy/drift": 0.02, "entropy/trainer": 1.0}
    apart, equal = Evidence(), Evidence()
    for step in range(8):
        apart.update(step, TOKENS, SEQUENCES, values)
        equal.update(step, TOKENS, SEQUENCES, values, copies=16)
    assert "entropy" in apart.decided
    assert equal.decided == ()


def test_a_drift_over_the_floor_from_the_first_window_on_is_decided(rng):
    evidence = Evidence()
    _, decision = watch(evidence, (window(rng, level=1.8) for _ in range(25)))
    assert decision is not None
    assert evidence.decided == ("drift",)
    assert evidence.finding("drift").statistic in ("logp_abs_diff/mean", "kl_k3")


def test_with_standard_errors_drift_needs_no_earlier_windows(rng):
    errors = {"se/kl_k1": 4e-4, "se/logp_abs_diff/mean": 1e-3, "se/kl_k3": 3e-5}
    with_errors = watch(Evidence(), (window(rng, level=2.0) | errors for _ in range(12)))[1]
    assert with_errors is not None
    assert with_errors < 5


def test_a_change_is_told_with_its_onset_and_its_size_though_no_floor_is_known(rng):
    evidence = Evidence()
    _, decision = watch(evidence, (window(rng, floor=False) for _ in range(120)))
    assert decision is None
    _, decision = watch(evidence, (window(rng, level=1.6, floor=False) for _ in range(25)), first=120)
    assert decision is not None
    assert evidence.decided == ("change",)
    found = evidence.finding("change")
    assert abs(found.onset - 120) <= 2
    assert found.level == pytest.approx(1.6 if found.statistic == "logp_abs_diff/mean" else 2.56, rel=0.15)
    assert evidence.scalars()["evidence/onset"] == found.onset


def test_a_change_within_the_noise_floor_is_none(rng):
    evidence = Evidence()
    watch(evidence, (window(rng, level=0.5) for _ in range(100)))
    highest, decision = watch(evidence, (window(rng, level=0.9) for _ in range(60)), first=100)
    assert decision is None
    assert highest["change"] < 1.0


def test_a_fault_that_was_decided_and_mended_is_over_after_three_windows(rng):
    evidence = Evidence()
    watch(evidence, (window(rng) for _ in range(30)))
    watch(evidence, (window(rng, bias=0.01, level=3.0, withheld=0.5) for _ in range(40)), first=30)
    assert set(evidence.decided) == set(TESTS)
    watch(evidence, (window(rng) for _ in range(12)), first=70)
    assert evidence.decided == ()
    _, decision = watch(evidence, (window(rng, bias=0.01, level=3.0) for _ in range(10)), first=82)
    assert decision is not None


def test_rows_that_are_one_draw_weigh_as_one(rng):
    values = window(rng, bias=0.005)
    one, eight, plain = Evidence(), Evidence(), Evidence()
    one.update(0, TOKENS, SEQUENCES, values)
    eight.update(0, 8 * TOKENS, SEQUENCES, values, copies=8)
    plain.update(0, 8 * TOKENS, SEQUENCES, values)
    honesty = [evidence.bets["honesty"].log10_evidence for evidence in (one, eight, plain)]
    assert honesty[0] == pytest.approx(honesty[1])
    assert honesty[2] > honesty[1]


HALF = {"ratio/clipped": 1.0, "ratio/clipped_square": math.nan, "floor_upper/kl_k3": 1e-4}


def test_what_was_not_measured_is_not_bet_on():
    evidence = Evidence()
    for step, values in enumerate([{}, {"kl_k1": None, "trimmed/kl_k3": "nan"}, HALF] * 10):
        evidence.update(step, 0, 0, values)
    assert evidence.scalars() == dict.fromkeys([*(f"evidence/{test}" for test in TESTS), "evidence/onset"])
    assert evidence.decided == ()


# ---- memory -------------------------------------------------------------------------------------------------------


def test_a_restored_run_goes_on_as_if_never_interrupted(rng):
    windows = [window(rng, bias=0.004 * (step > 60), level=1.0 + 0.6 * (step > 70)) for step in range(90)]
    whole, first, second = Evidence(), Evidence(), Evidence()
    watch(whole, windows)
    watch(first, windows[:65])
    second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    watch(second, windows[65:], first=65)
    assert second.scalars() == whole.scalars()
    assert second.state() == whole.state()
    assert len(json.dumps(whole.state())) < 11_000


def test_a_checkpoint_of_before_there_was_a_test_goes_on_with_the_others(rng):
    old, new = Evidence(), Evidence()
    watch(old, (window(rng, bias=0.004) for _ in range(30)))
    state = old.state()
    del state["bets"]["entropy"]
    state["past"] = {name: [values[:3] for values in rows] for name, rows in state["past"].items()}
    new.load_state(state)
    assert new.bets["honesty"].state() == old.bets["honesty"].state()
    assert new.bets["entropy"].windows == 0
    watch(new, [window(rng) | {"se/entropy/drift": 0.05}], first=30)
    assert new.bets["entropy"].windows == 1


def test_a_state_between_unmeasured_windows_is_json(rng):
    evidence = Evidence()
    watch(evidence, [window(rng) for _ in range(20)])
    evidence.update(20, 0, 0, {})
    state = json.loads(json.dumps(evidence.state(), allow_nan=False))
    again = Evidence()
    again.load_state(state)
    assert again.state() == state


def test_the_windows_of_metrics_jsonl_give_the_very_same_evidence(rng):
    live, replayed = Evidence(), Evidence()
    for step in range(40):
        values = window(rng, bias=0.005)
        verdict = Verdict(step=step, status=Status.OK, streak=0, stats=MismatchStats(TOKENS, SEQUENCES, 1, 0, values))
        row = json.loads(json.dumps(verdict.to_dict()))
        live.update(step, TOKENS, SEQUENCES, values)
        replayed.update(row["step"], row["num_tokens"], row["num_sequences"], row)
    assert replayed.scalars() == live.scalars()


def test_runs_in_lockstep_are_as_each_by_itself(rng):
    together = Evidence(shape=(2,))
    alone = [Evidence(), Evidence()]
    for step in range(40):
        both = [window(rng), window(rng, level=1.7)]
        values = {name: np.array([values[name] for values in both]) for name in both[0]}
        together.update(step, np.full(2, float(TOKENS)), np.full(2, float(SEQUENCES)), values)
        for evidence, values in zip(alone, both, strict=True):
            evidence.update(step, TOKENS, SEQUENCES, values)
    for test in TESTS:
        found = [evidence.bets[test].log10_evidence for evidence in alone]
        assert together.bets[test].log10_evidence == pytest.approx(found, rel=1e-9)
