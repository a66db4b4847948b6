"""Words for people: the halt, told like a health check, and alerts."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from .._version import __version__
from ..causes import CAUSES
from ..config.parity import ParityConfig
from ..judging.breaker import Reading, read
from ..judging.course import Course
from ..judging.health import HEALTH, signs
from ..records import Diagnosis
from ..verdict import MismatchStats, Verdict
from .counted import counted
from .escape import one_line
from .format import cut, number
from .looser import looser_rules
from .outcome import outcome
from .places import places
from .recovery import last_checkpoint_before, learned_from, recovery

__all__ = ["alert_text", "ending_text", "halt_text", "left_out", "skipped_text", "start_text"]

_APART = "The engine that samples is not the policy that learns."

# what a statistic over its limit says, by the beginning of its name
_SAYS = (
    (("kl_", "logp_abs_diff/", "ratio/", "ess", "chi2", "confident_", "last_token/", "seq/", "own_head/", "replayed/",
      "trimmed/", "excess/", "truncation/", "honesty", "evidence/honesty", "evidence/drift"), _APART),
    (("replica/",), "The rollouts of one rank are not of the policy that learns."),
    (("evidence/change",), "The two sides are further apart than they were in this run's past."),
    (("entropy/drift", "evidence/entropy"), "The sampled tokens do not have the entropy of the policy that learns."),
    (("nonfinite_rate",), "Log-probs are no finite numbers."),
    (("entropy/nonfinite_rate",), "The trainer's entropies are no finite numbers."),
    (("correction/",), "TRL's correction takes most of the loss away."),
    (("reference/",), "The reference of the KL term is not the model that training began with."),
    (("completions/",), "Completions that ended are masked as truncated."),
    (("floor/engine_excess",), "The engine does not agree with itself."),
)  # fmt: skip

_CONSEQUENCE = {
    "log": "Training goes on (action=log): it learns from such batches.",
    "skip_update": "This batch's gradient is dropped (action=skip_update); training goes on.",
    "stop": "This batch's gradient is dropped, a checkpoint is saved and training ends (action=stop).",
    "raise": "Training ends here with ParityHalt (action=raise); this batch was not learned from.",
}

_SHOWN = ("kl_k3", "logp_abs_diff/mean", "logp_abs_diff/max", "ratio/out_of_band", "ess", "honesty", "entropy/trainer")


def halt_text(
    verdict: Verdict,
    config: ParityConfig,
    verdicts: Sequence[Verdict],
    path: Path,
    diagnosis: Diagnosis | None = None,
    output_dir: Path | None = None,
) -> str:
    """What was seen with counts, what it does, the cause with its evidence, what mends it, how to go on anyway.

    Of a window that was halted, or breached. ``path``: the file to look at. ``output_dir``: where the trainer's
    checkpoints are; None: it has none to resume.
    """
    onward = looser_rules(verdict.breaches, verdict.stats or {}, config)
    lines = [
        "",
        f"trl-parity: {verdict.status} at step {verdict.step}. {' '.join(_headlines(verdict.breaches))}",
        "",
        *_seen(verdict, config, verdicts),
        "",
        *_wrap("Means", _CONSEQUENCE[config.action] if verdict.halted else _goes_on(config)),
    ]
    if diagnosis is None or diagnosis.cause == "unknown":
        for finding in findings(verdict):
            lines += _wrap("", finding)
    else:
        lines += _wrap("", CAUSES[diagnosis.cause].harm)
        for place in places(verdict.stats or {}, verdict.breaches):
            lines += _wrap("", place)
    learned = learned_from(verdict, verdicts, config)
    if output_dir is not None and verdict.halted:
        checkpoint = last_checkpoint_before(output_dir, learned.first)
        told, command = recovery(learned, checkpoint, config.action)
        lines += ["", *_wrap("Learned", told), *([f"           {command}"] if command else [])]
    if diagnosis is not None:
        lines += ["", *_cause(diagnosis)]
    lines += [
        "",
        f"  Look     {path}",
        *_wrap(
            "Go on",
            f"anyway: ParityConfig(action='log'), or, if this drift is expected, wider rules={onward}; "
            "trl-parity replay shows what they would have done.",
        ),
        "",
    ]
    return "\n".join(lines).replace("\xa0", " ")


def _headlines(breaches: Sequence[str]) -> list[str]:
    """What the statistics over their limit say, and nothing else; each sentence once, in the order of ``_SAYS``."""
    said = [text for names, text in _SAYS if any(name.startswith(names) for name in breaches)]
    return said or ["What was measured is over its limit."]


def _goes_on(config: ParityConfig) -> str:
    """What a BREACH means."""
    longer = f", or with fewer than {config.breach_memory} healthy ones between," if config.breach_memory else ""
    return f"Training goes on: {config.consecutive} such windows in a row{longer} halt it."


def _seen(verdict: Verdict, config: ParityConfig, verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The windows that the halt counts, what they breached and by how much."""
    stats = verdict.stats
    rules = {rule.stat: rule for rule in config.resolved_rules()}
    streak, count = counted(verdict, config, verdicts)
    steps = f", steps {streak[0].step} to {verdict.step}" if streak and streak[0].step != verdict.step else ""
    yield f"  Seen     {count}{steps}:"
    for name in verdict.breaches:
        readings = [None if v.stats is None else read(rules[name], v.stats) for v in streak[-5:]]
        looks = list(dict.fromkeys((r.seen, _kind(r)) for r in readings if r is not None))
        for look in looks:  # the excess over the floor in one window may be the statistic over its ceiling in another
            mine = [r for r in readings if (r is None and len(looks) == 1) or (r and (r.seen, _kind(r)) == look)]
            known = [r for r in mine if r is not None]
            trail = " → ".join(number(None if r is None else r.value) for r in mine)
            limits = dict.fromkeys(number(r.limit) for r in known)
            sign = ">=" if known[0].rule.below else "<="
            told = f"{look[1]}{'s' * (len(limits) > 1)} {sign} {' → '.join(limits)}"
            yield f"             {look[0]:<26} {trail}   ({told})"
    if stats is not None:
        yield f"           in {stats.num_tokens:,} tokens of {stats.num_sequences:,} sequences of the last window:"
        yield from _wrap("", ", ".join(f"{name}\xa0{number(stats.get(name))}" for name in _SHOWN))


def _kind(reading: Reading) -> str:
    """What its limit is."""
    above_floor = reading.missing or reading.seen.startswith("excess/")
    return "limit" if reading.rule.k is None or above_floor else "ceiling"


def _cause(diagnosis: Diagnosis) -> Iterator[str]:
    """The named cause (or none), its evidence, and the line to change."""
    if diagnosis.cause == "unknown":
        yield from _wrap("Cause", f"unknown. {diagnosis.summary}")
        return
    first, *rest = diagnosis.causes
    also = "".join(f", then {c.cause} {c.explained:.0%}" for c in rest)
    yield from _wrap(
        "Cause",
        (
            f"{first.cause}: explains {first.explained:.0%} of the drift above the noise floor"
            if diagnosis.explained
            else f"{first.cause}, beside a drift within the noise floor"
        )
        + f" (confidence {first.confidence:.0%}; found at step {diagnosis.step}{also}).",
    )
    yield from _wrap("", f"{CAUSES[first.cause].what} Seen: {first.finding}.")
    for cause in rest:
        yield from _wrap("", f"{cause.cause}: {cause.finding}.")
    yield from _wrap("Fix", first.fix)
    for cause in rest:
        yield from _wrap("", cause.fix)


def alert_text(verdict: Verdict) -> str:
    """A few words for a WARN-level alert."""
    told = f"trl-parity: {verdict.status} at step {verdict.step}: {verdict.reason}. Training goes on."
    explained = verdict.breaches or {"entropy/relative", "correction/lost", *HEALTH} & {*verdict.warnings}
    return " ".join([told, *findings(verdict)]) if explained else told


def start_text(trainer: str, config: ParityConfig, folder: Path, logging_steps: int = 1) -> str:
    """One line at a run's start: what is watched, how, and where it is written."""
    n = config.every_n_steps
    text = f"trl-parity {__version__} watches {trainer}: windows of {n} step{'s' * (n != 1)}, action={config.action}"
    if logging_steps > n:
        text += f", a row in the trackers merges those of {logging_steps} steps (logging_steps)"
    left = left_out(config)
    return f"{text}; files in {folder}" + (f". {left}" if left else "")


def left_out(config: ParityConfig) -> str:
    """One sentence: what of the run's loss this verdict is not about; "" where it is about all."""
    if config.truncation != "replay":
        return ""
    return (
        "Judged with the engine's truncation and penalties replayed (truncation='replay'), not as TRL's loss is: the "
        "verdict leaves out own-head drift (parity/own_head/*) and what they make of TRL's correction weights "
        "(parity/correction/lost, which only warns)."
    )


def ending_text(course: Course, last: Verdict | None, cause: str | None, skipped: int, look: Path) -> str:
    """One line at a run's end: what it came to, why, and where to look. ``last``: the last HALT, if it stands."""
    status, text = outcome(course)
    if last is not None:
        text += f": {cut(one_line(last.reason), 400)}" + (f"; cause: {cause}" if cause else "")
    if skipped:
        text += f"; {skipped:,} update{'s' * (skipped != 1)} dropped"
    return f"trl-parity: {status}, {text}. Look: {look}"


def skipped_text(skipped: int, last: Verdict) -> str:
    """A reminder that nothing is learned while a halt stands."""
    return (
        f"trl-parity: {skipped:,} updates dropped so far (action=skip_update), still halted at step {last.step}: "
        f"{cut(one_line(last.reason), 200)}"
    )


def _wrap(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, 108, initial_indent=f"  {label:<9}", subsequent_indent=" " * 11)


def _accumulated(stats: MismatchStats, named: Sequence[str]) -> Iterator[str]:
    """What the tests over all windows decided."""
    told = {
        "evidence/honesty": "the mean ratio of its tokens is not 1",
        "evidence/drift": "its drift is above what the noise floor allows",
        "evidence/change": "its drift is above what it was before",
        "evidence/entropy": "the tokens it sampled are not as surprising as the trainer's law says",
    }
    onset = stats.get("evidence/onset")
    for name, text in told.items():
        if name in named and (evidence := stats.get(name)) is not None:
            since = "" if onset is None else f", since step {onset:.0f}"
            yield f"Over the whole run, {text}{since}: one healthy run in 10^{evidence:.1f} gets there, or fewer."


def findings(verdict: Verdict) -> Iterator[str]:
    """What the numbers say about the kind of drift; measured facts only, no cause is guessed."""
    stats = verdict.stats
    if stats is None:
        return
    low, high, own, fp32 = (stats.get(k) for k in ("honesty_low", "honesty_high", "own_head/kl_k3", "kl_k3"))
    named = verdict.breaches or verdict.warnings  # while something is over its limit, a watch's warning is no news
    corrected = [name for name in named if name.startswith("correction/")]
    apart = _APART in _headlines(named)  # what else is over a limit is no word on the two sides
    cut_off, replayed = stats.get("truncation/kept_mass") is not None, stats.get("replayed/kl_k3")
    # before there was replayed/*, nothing was measured of a truncation that was not replayed
    plain = not cut_off or (replayed is not None and fp32 is not None and not math.isclose(replayed, fp32))
    if apart and plain and replayed is not None and fp32 is not None and fp32 > 2 * replayed:
        yield (
            f"With the engine's truncation and penalties on the trainer's side, too, the drift is {replayed:.3g} "
            f"instead of {fp32:.3g}: the loss does not know them."
        )
    elif apart and low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        dishonest = any(name.startswith(("honesty", "seq/bias_gap", "evidence/honesty")) for name in named)
        if dishonest and (low > 1.0 or high < 1.0):
            yield (
                f"The reported log-probs are not those of the law that was sampled: mean ratio in [{low:.4f}, "
                f"{high:.4f}], expected to hold 1 (raw log-probs, truncation or misaligned tokens do this)."
            )
        elif not dishonest and low <= 1.0 <= high:
            yield (
                f"The reported log-probs fit the law that was sampled (mean ratio in [{low:.4f}, {high:.4f}] holds "
                "1), so the two sides seem to hold different models (stale or partial weights, precision, cache)."
            )
    if apart and own and fp32 is not None and own > 2 * fp32:
        if plain:
            yield f"The trainer's own head drifts more ({own:.3g}) than an fp32 head ({fp32:.3g})."
        else:
            yield f"The loss, which knows no truncation, drifts more ({own:.3g}) than the replayed law ({fp32:.3g})."
    if corrected:
        zeroed, lost = stats.get("correction/zeroed") or 0.0, stats.get("correction/lost") or 0.0
        yield (
            f"TRL's correction multiplies the loss of {zeroed:.0%} of the sequences by 0, and takes {lost:.0%} of the "
            "weight of all away. Log-ratios of sequences grow with length: vllm_importance_sampling_mode="
            "'token_truncate' weighs tokens one by one."
        )
    yield from places(stats, named if apart else [name for name in named if name.startswith("replica/")])
    yield from _accumulated(stats, named)
    for sign, seen in signs(stats, named):
        cause = f" ({sign.cause})" if sign.cause else ""
        yield f"{seen[:1].upper()}{seen[1:]}{cause}. {sign.mends[:1].upper()}{sign.mends[1:]}"
    rate, left = stats.get("nonfinite_rate"), stats.get("entropy/relative")
    if rate:
        yield f"{rate:.2%} of the tokens have no finite log-prob."
    if left is not None and math.isnan(left):
        yield "The policy's entropy is no finite number."
    elif left is not None and left < 0.1 and (not verdict.breaches or "entropy/relative" in named):
        yield (
            f"The policy's entropy is down to {left:.1%} of its beginning: so certain a policy hides every drift, and "
            "log-probs that are not finite come next."
        )
