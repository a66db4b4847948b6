"""What is printed at a halt claims what was seen, and no more."""

from pathlib import Path

import pytest
from support.windows import window

from trl_parity import ParityConfig
from trl_parity.judging.breaker import Breaker
from trl_parity.report.messages import halt_text
from trl_parity.verdict import Status, Verdict

BAD, GOOD, EMPTY = window(kl_k3=0.2), window(kl_k3=0.01), window(nonfinite_rate=None)


def told(windows, **settings):
    """The text of the first halt of these windows."""
    config = ParityConfig(floor_tokens=0, rules={"kl_k3": 0.1}, **settings)
    breaker, verdicts = Breaker.from_config(config), []
    for step, stats in enumerate(windows, start=1):
        verdicts.append(breaker.judge(step, stats))
        if verdicts[-1].halted:
            return halt_text(verdicts[-1], config, verdicts, Path("report.md"))
    raise AssertionError("no halt")


@pytest.mark.parametrize(
    ("windows", "settings", "seen"),
    [
        ([GOOD, BAD, BAD, BAD], {}, "3 window(s) in a row over the limit, steps 2 to 4:"),
        ([BAD, EMPTY, BAD, EMPTY, BAD], {}, "3 window(s) in a row over the limit, steps 1 to 5:"),
        ([BAD, *[GOOD] * 4, BAD, *[GOOD] * 4, BAD], {}, "3 breaches in the last 11 windows, steps 1 to 11:"),
        ([BAD, GOOD, BAD, GOOD, BAD], {}, "3 breaches in the last 5 windows, steps 1 to 5:"),
        # the first is nearly forgotten by then
        ([BAD, *[GOOD] * 19, BAD, GOOD, BAD, GOOD, BAD], {}, "3 breaches in the last 5 windows, steps 21 to 25:"),
        ([GOOD, BAD, GOOD, BAD], {"consecutive": 2}, "2 breaches in the last 3 windows, steps 2 to 4:"),
        ([GOOD, BAD], {"consecutive": 1}, "1 window(s) in a row over the limit:"),
    ],
)
def test_it_counts_what_the_halt_counted(windows, settings, seen):
    text = told(windows, **settings)
    assert f"  Seen     {seen}\n" in text
    trail = next(line for line in text.splitlines() if "kl_k3  " in line)
    assert trail.count("0.2") == int(seen.split()[0])


# ---- golden texts: only what breached is claimed

APART = "The engine that samples is not the policy that learns."
FITS, DISHONEST, OWN = (
    "fit the law that was sampled",
    "not those of the law that was sampled",
    "The trainer's own head",
)
LAW = ("kl_k3", "logp_abs_diff/mean")
WITHIN = {"honesty_low": 1.001, "honesty_high": 1.01}  # not at 1, and within the rule's limit
AT_ONE = {"honesty_low": 0.99, "honesty_high": 1.01}
OFF = {"honesty_low": 0.97, "honesty_high": 0.98}

GOLDEN = {
    "two models": (LAW, (), AT_ONE, APART, (FITS,), (DISHONEST,)),
    "two models, the interval within its limit": (LAW, (), WITHIN, APART, (), (FITS, DISHONEST)),
    "raw log-probs": ((*LAW, "honesty_gap"), (), OFF, APART, (DISHONEST,), (FITS,)),
    "a few nats a sequence": (("seq/bias_gap",), (), OFF, APART, (DISHONEST,), (FITS,)),
    "one seed for all": (("entropy/drift_gap",), (), AT_ONE | {"own_head/kl_k3": 1.0},
        "The sampled tokens do not have the entropy of the policy that learns.", (), (FITS, DISHONEST, OWN, APART)),
    "NaN": (("nonfinite_rate",), (), AT_ONE | {"nonfinite_rate": 0.1}, "Log-probs are no finite numbers.",
        ("10.00% of the tokens have no finite log-prob",), (FITS, DISHONEST, APART)),
    "entropy NaN": (("entropy/nonfinite_rate",), (), {}, "The trainer's entropies are no finite numbers.", (),
        (APART,)),
    "the correction": (("correction/zeroed",), ("correction/lost",), AT_ONE | {"correction/zeroed": 0.9},
        "TRL's correction takes most of the loss away.", ("of 90% of the sequences by 0",), (FITS, APART)),
    "an engine of two minds": (("floor/engine_excess",), (), AT_ONE, "The engine does not agree with itself.", (),
        (FITS, DISHONEST, APART)),
    "a faint bias": (("evidence/honesty",), (), WITHIN | {"evidence/honesty": 4.2, "evidence/onset": 17.0}, APART,
        ("Seen decided over all windows of the run, by log10 of the evidence: evidence/honesty 4.2 (limit <= 4)",
         "the mean ratio of its tokens is not 1, since step 17: one healthy run in 10^4.2", DISHONEST), (FITS,)),
    "a faint drift": (("evidence/drift",), (), {"evidence/drift": 4.5}, APART,
        ("its drift is above what the noise floor allows: one healthy run in 10^4.5 gets there",), (FITS, DISHONEST)),
    "a change": (("evidence/change",), (), {"evidence/change": 5.0},
        "The two sides are further apart than they were in this run's past.", (), (APART,)),
    "both sides and NaN": (("kl_k3", "nonfinite_rate"), (), AT_ONE, f"{APART} Log-probs are no finite numbers.", (),
        ()),
    "a watch beside a breach": (("kl_k3",), ("entropy/relative", "correction/lost"), {"entropy/relative": 0.05}, APART,
        (), ("entropy is down", "TRL's correction")),
    "one rank": (("replica/logp_abs_diff/mean",), (), {"replica/rank": 3.0, "logp_abs_diff/mean": 0.01},
        "The rollouts of one rank are not of the policy that learns.",
        ("Rank 3 drifts in each of the last windows, by a mean |Δ| of 0.5 at least (all ranks together: 0.01)",),
        (APART, FITS)),
    "a rule of one's own": (("reward/parted",), (), AT_ONE, "What was measured is over its limit.", (), (FITS, APART)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_a_halt_claims_only_what_breached(name):
    breaches, warnings, values, headline, said, unsaid = GOLDEN[name]
    stats = window(**dict.fromkeys(breaches, 0.5) | values)
    verdict = Verdict(step=9, status=Status.HALT, streak=3, breaches=breaches, warnings=warnings, stats=stats)
    config = ParityConfig(rules={"reward/parted": {"limit": 0.1}}, floor_tokens=0)
    text = halt_text(verdict, config, [verdict], Path("report.md"))
    first = text.strip().split("\n", 1)[0]
    assert first == f"trl-parity: HALT at step 9. {headline}"
    words = " ".join(text.split())
    for part in said:
        assert part in words
    for part in unsaid:
        assert part not in words


def test_a_breach_says_that_training_goes_on():
    verdict = Verdict(step=9, status=Status.BREACH, streak=1, breaches=("kl_k3",), stats=BAD)
    text = " ".join(halt_text(verdict, ParityConfig(), [verdict], Path("report.md")).split())
    assert text.startswith(f"trl-parity: BREACH at step 9. {APART} Seen 1 window(s) in a row over the limit:")
    assert "Training goes on: 3 such windows in a row, or with fewer than 20 healthy ones between, halt it." in text
    assert "stop" not in text


def test_a_cause_beside_a_drift_within_the_floor_explains_none_of_it():
    from trl_parity.causes import CAUSES
    from trl_parity.records import Diagnosis, NamedCause

    name, words = "duplicate_rollouts", "28 of 28 pairs of completions of one prompt are equal"
    named = NamedCause(cause=name, explained=0.0, confidence=1.0, finding=words, fix=CAUSES[name].fix)
    found = Diagnosis(step=2, cause=name, explained=0.0, confidence=1.0, summary="", fix="", causes=(named,))
    config = ParityConfig(floor_tokens=0, rules={"kl_k3": 0.1}, consecutive=1)
    verdict = Breaker.from_config(config).judge(1, BAD)
    text = " ".join(halt_text(verdict, config, [verdict], Path("report.md"), found).split())
    assert f"{name}, beside a drift within the noise floor (confidence 100%; found at step 2)." in text
    assert f"Seen: {words}." in text
    assert "take seed out of generation_kwargs" in text
