"""Rows on engine against reference, from the sums of trials: limits, and which mechanism the drift goes back to.

Each mechanism is told by what only it does:

- scale: one factor on the reference's logits makes the engine's laws of them.
- positions: with one token of context attention has nothing to weigh, so rotary embeddings, windows and whatever else
  depends on positions can't matter there; drift that spares those tokens is theirs.
- weights: the engine's tensors, read back through its own loader, differ from the trainer's.
- config: a model on the trainer's weights built from the engine's config agrees with the engine.
- kv_cache: a reference whose keys and values are rounded as in the engine's cache agrees with it.
- dtype: the drift is as large as noise of the engine's dtype, and larger than noise of the trainer's.
- model: none of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...report.format import number
from .drift import Counterfactuals, Drift, Gaps, bucket_name, drift_of, sampled_kl
from .rows import Limits, Row, RowVerdict, within_floor
from .statistics import fitted_scale, wilson

__all__ = ["EXPLAINED", "limit_rows", "mechanism_rows", "pass_rate_interval"]

EXPLAINED = 0.5  # a mechanism is to blame when undoing it takes away this share of the drift above the floor

_SCALE = 0.003  # of the logits: smaller factors are no fault

_SCALED = 0.9  # a factor alone explains nearly all there is; another fault may look like one by half

_EPS = {
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float8_e4m3fn": 2.0**-3,
    "float8_e5m2": 2.0**-2,
}


# ---- limits ------------------------------------------------------------------------------------------------------


def limit_rows(drift: Drift) -> list[Row]:
    """Mean KL, the worst trial, the pass rate: each against its limit and against the dtype's own noise."""
    gaps, limits, floor = drift.gaps, drift.limits, drift.floors.engine
    exact = bool(gaps.kl.count + gaps.kl.bad)
    sums = gaps.kl if exact else gaps.k3
    counted = f"exact over the whole vocabulary on {gaps.kl.count:,} tokens"
    if gaps.k3.count:
        counted += f"; k3 of {gaps.k3.count:,} more sampled tokens: {number(gaps.k3.mean)}"
    if not exact:
        counted = "k3 of the sampled tokens: the engine gave no whole law"
    common: dict[str, Any] = {"group": "limits", "trials": gaps.trials, "tokens": sums.count}
    spread = math.sqrt(max(0.0, sums.squares / sums.count - sums.mean**2) / sums.count) if sums.count else math.nan
    rows = [
        Row(
            id="kl_mean", title="mean KL(engine ‖ reference)", statistic="mean KL, nats", value=sums.mean,
            limit=limits.mean_kl, floor=sampled_kl(floor), worst=sums.maximum,
            interval=(max(0.0, sums.mean - drift.z * spread), sums.mean + drift.z * spread),
            verdict=_limit(sums.mean, limits.mean_kl, sampled_kl(floor), limits),
            evidence=f"{counted}; 99th percentile {number(sums.quantile(0.99))}, largest {number(sums.maximum)}",
            **common,
        ),
        Row(
            id="kl_max", title="KL of the worst trial", statistic="largest mean KL of a trial, nats",
            value=gaps.worst, limit=limits.max_kl, floor=floor.worst, worst=sums.maximum,
            verdict=_limit(gaps.worst, limits.max_kl, floor.worst, limits),
            evidence=f"of {gaps.trials} trials", **common,
        ),
        _pass_rate(drift),
        Row(
            id="logprobs", title="log-probs of the sampled tokens", statistic="mean |Δ|, nats",
            value=gaps.delta.mean, floor=floor.delta.mean, worst=gaps.delta.maximum,
            verdict=RowVerdict.FAIL if drift.excessive else RowVerdict.PASS,
            evidence=f"99th percentile {number(gaps.delta.quantile(0.99))} (noise "
            f"{number(floor.delta.quantile(0.99))}), largest {number(gaps.delta.maximum)} (noise "
            f"{number(floor.delta.maximum)}); judged against {drift.limits.k:g} x the noise of "
            f"{drift.floors.engine_dtype} in KL",
            **common | {"tokens": gaps.delta.count},
        ),
    ]  # fmt: skip
    return [_explained(row, drift) for row in rows]


def _limit(value: float, limit: float, floor: float, limits: Limits) -> RowVerdict:
    if math.isnan(value):
        return RowVerdict.NOT_RUN
    if value < limit:
        return RowVerdict.PASS
    return RowVerdict.OUT_OF_REACH if within_floor(value, floor, limits) else RowVerdict.FAIL


def pass_rate_interval(gaps: Gaps, z: float) -> tuple[float, float]:
    """Wilson's interval of the share of tokens within the limit.

    Tokens of a trial pass and fail together: it holds as many independent ones as the spread between trials allows.
    """
    count = gaps.kl.count + gaps.kl.bad
    failed = gaps.over / count
    between = gaps.over_squares - 2 * failed * gaps.over_cross + failed**2 * gaps.sizes
    alike = max(1.0, between / (count * failed * (1 - failed))) if 0 < failed < 1 else 1.0
    return wilson((count - gaps.over) / alike, count / alike, z)


def _pass_rate(drift: Drift) -> Row:
    gaps, limits, floor = drift.gaps, drift.limits, drift.floors.engine
    count = gaps.kl.count + gaps.kl.bad
    title = f"tokens with KL under {limits.max_kl:g}"
    if not count:
        return Row(
            id="pass_rate", group="limits", title=title, verdict=RowVerdict.NOT_RUN,
            evidence="the engine gave no whole law, so no token has an exact KL",
        )  # fmt: skip
    rate = 1.0 - gaps.over / count
    low, high = pass_rate_interval(gaps, drift.z)
    own = floor.kl.count + floor.kl.bad
    own_rate = 1.0 - floor.over / own if own else math.nan
    if rate > limits.pass_rate:
        verdict = RowVerdict.PASS if low > limits.pass_rate else RowVerdict.UNCLEAR
    elif 1 - rate <= limits.k * (1 - own_rate) and not drift.excessive:
        verdict = RowVerdict.OUT_OF_REACH
    else:
        verdict = RowVerdict.FAIL
    words = f"{gaps.over:,} of {count:,} tokens are over"
    if verdict is RowVerdict.UNCLEAR:
        words += "; too few to tell: more --trials narrow the interval"
    return Row(
        id="pass_rate", group="limits", title=title, statistic="share of tokens", value=rate, limit=limits.pass_rate,
        at_least=True, floor=own_rate, interval=(low, high), tokens=count, trials=gaps.trials, verdict=verdict,
        evidence=words,
    )  # fmt: skip


def _explained(row: Row, drift: Drift) -> Row:
    if row.verdict is not RowVerdict.OUT_OF_REACH:
        return row
    return replace(
        row,
        evidence=f"{row.evidence}. {drift.floors.engine_dtype} noise alone makes {number(row.floor)} of this model",
        fix=f"dtype: float32 on both sides, or a limit that {drift.floors.engine_dtype} can meet",
    )


# ---- mechanisms --------------------------------------------------------------------------------------------------


def mechanism_rows(
    drift: Drift,
    what_if: Counterfactuals,
    *,
    settings: Mapping[str, Any],
    config_differs: Mapping[str, Sequence[str]],
    held: Sequence[Any] | None,
    held_error: str = "",
    held_needed: bool = False,
) -> list[Row]:
    """One row a mechanism, and ``model`` for what none of them explains."""
    rows = [
        _dtype(drift, settings),
        _kv_cache(drift, what_if, settings),
        _weights(drift, what_if, held, held_error, held_needed),
        _config(drift, what_if, config_differs),
        _scale(drift),
        _positions(drift, bool(config_differs)),
    ]
    blamed = [row.id for row in rows if row.verdict is RowVerdict.FAIL and row.id != "dtype"]
    return [*rows, _model(drift, blamed)]


def _common(drift: Drift) -> dict[str, Any]:
    return {"group": "mechanisms", "trials": drift.gaps.trials, "tokens": drift.gaps.delta.count}


def _dtype(drift: Drift, settings: Mapping[str, Any]) -> Row:
    floors = drift.floors
    coarser = _EPS.get(floors.engine_dtype, 1.0) > _EPS.get(floors.trainer_dtype, 0.0)
    fails = coarser and drift.coarser
    # the drift may have another cause as well: what this dtype alone does is the noise measured in it
    value = min(drift.size, drift.noise) if fails else drift.size if not drift.excessive else drift.noise
    words = f"engine {floors.engine_dtype} (head {settings.get('engine_head_dtype')}), trainer {floors.trainer_dtype}"
    if fails:
        words += (
            f"; noise of {floors.engine_dtype} makes {number(drift.noise)} of this model, noise of "
            f"{floors.trainer_dtype} {number(drift_of(floors.trainer))}"
        )
    return Row(
        id="dtype", title="dtype of the two sides", statistic="drift, nats", value=value,
        floor=drift_of(floors.trainer), verdict=RowVerdict.FAIL if fails else RowVerdict.PASS, evidence=words,
        fix=f"one dtype on both sides: dtype: {floors.trainer_dtype} in the engine's settings, or a trainer in "
        f"{floors.engine_dtype} (--trainer-dtype {floors.engine_dtype})" if fails else "",
        **_common(drift),
    )  # fmt: skip


def _kv_cache(drift: Drift, what_if: Counterfactuals, settings: Mapping[str, Any]) -> Row:
    name = str(settings.get("kv_cache_dtype"))
    shares = {n: what_if.explained(n) for n in what_if.undone if n.startswith("kv:")}
    best = max(shares, key=lambda n: shares[n], default="")
    share = shares.get(best, 0.0)
    fails = drift.excessive and share >= EXPLAINED
    words = f"kv_cache_dtype {name}"
    if fails:
        words += f"; keys and values rounded to {best.removeprefix('kv:')} explain {share:.0%} of the drift"
    elif shares and drift.excessive:
        words += f"; rounded alike, the reference explains {max(0.0, share):.0%} of the drift"
    return Row(
        id="kv_cache", title="precision of the key-value cache", statistic="share of the drift explained",
        value=share if shares else None, limit=EXPLAINED, verdict=RowVerdict.FAIL if fails else RowVerdict.PASS,
        evidence=words, fix="kv_cache_dtype: auto" if fails else "", **_common(drift),
    )  # fmt: skip


def _weights(drift: Drift, what_if: Counterfactuals, held: Sequence[Any] | None, error: str, needed: bool) -> Row:
    row: dict[str, Any] = {"id": "weights", "title": "weights the engine holds", **_common(drift)}
    if held is None:
        return Row(verdict=RowVerdict.NOT_RUN, evidence=error, needed=needed, **row)
    off = [t for t in held if t.differing]
    lost = [t for t in held if not t.written]
    total = sum(t.numel for t in held)
    words = f"{len(held)} tensors, {total:,} numbers, read back from the engine: "
    if off:
        listed = ", ".join(f"{t.name} (mean gap {number(t.gap)})" for t in sorted(off, key=lambda t: -t.gap)[:6])
        words += f"{len(off)} differ from the trainer's: {listed}"
        share = what_if.explained("weights")
        words += f"; holding the engine's, the reference explains {share:.0%} of the drift" if share else ""
    else:
        words += "all are the trainer's, in the engine's dtype"
    if lost:
        names = ", ".join(t.name for t in lost[:6])
        words += f"; its loader takes no notice of {len(lost)}: {names}"
    fails = bool(off or (lost and drift.excessive))
    return Row(
        verdict=RowVerdict.FAIL if fails else RowVerdict.PASS, statistic="tensors that differ", value=float(len(off)),
        limit=0.0, evidence=words, fix="one checkpoint on both sides" if fails else "", **row,
    )  # fmt: skip


def _config(drift: Drift, what_if: Counterfactuals, differs: Mapping[str, Sequence[str]]) -> Row:
    share = what_if.explained("config")
    fails = drift.excessive and bool(differs) and share >= EXPLAINED
    words = "; ".join(f"{k}: trainer {a}, engine {b}" for k, (a, b) in sorted(differs.items())) or "both have one"
    if differs and drift.excessive:
        words += f"; the engine's config on the trainer's weights explains {max(0.0, share):.0%} of the drift"
    return Row(
        id="config", title="model config of the two sides", statistic="share of the drift explained",
        value=share if differs and drift.excessive else None, limit=EXPLAINED,
        verdict=RowVerdict.FAIL if fails else RowVerdict.PASS, evidence=words,
        fix="the same config on both sides: take it out of hf_overrides, or put it into the checkpoint's config.json"
        if fails else "", **_common(drift),
    )  # fmt: skip


def _scale(drift: Drift) -> Row:
    factor, share = fitted_scale(drift.gaps.curve)
    mean, noise = (
        g.prefill_kl.mean if g.prefill_kl.count else sampled_kl(g) for g in (drift.gaps, drift.floors.engine)
    )
    share = min(1.0, share * mean / (mean - noise)) if mean > noise else 0.0
    fails = drift.before_sampling and share >= _SCALED and abs(factor - 1.0) > _SCALE
    words = f"the engine's logits are {factor:.4f} x the reference's"
    if drift.excessive:
        words += f", which explains {max(0.0, share):.0%} of the exact KL"
    return Row(
        id="scale", title="scale of the logits (head, temperature)", statistic="factor", value=factor,
        verdict=RowVerdict.FAIL if fails else RowVerdict.PASS, evidence=words,
        fix="the same logit scale, soft cap, head weights and temperature on both sides" if fails else "",
        **_common(drift),
    )  # fmt: skip


_SAME_CONFIG = "the same rope_parameters, sliding window and attention scale on both sides"

_ONE_CONFIG = (
    "no setting: both sides have one config, and the two implementations read it otherwise (a window with or without "
    "the query's own key, a bias added twice; or a patch of one). `trl-parity atlas` shows it on a tiny model; "
    "another attn_implementation, or other versions of vLLM or transformers"
)


def _positions(drift: Drift, configs_differ: bool) -> Row:
    """Of mean Δ² / 2 by context length: whether drift spares the tokens that see one token only."""
    floor = drift.floors.engine.positions
    found = {key: sums.half_square for key, sums in sorted(drift.gaps.positions.items()) if sums.count + sums.bad}
    noise = {key: sums.half_square for key, sums in floor.items() if sums.count}
    table = {bucket_name(k): [v, noise.get(k)] for k, v in found.items()}
    row: dict[str, Any] = {"id": "positions", "title": "drift by position (RoPE, windows, attention)",
                           "details": {"by_context_length": table}, **_common(drift)}  # fmt: skip
    if 0 not in found or len(found) < 2:
        return Row(
            verdict=RowVerdict.NOT_RUN,
            evidence="no first tokens, or nothing beyond them",
            needed=drift.excessive,
            **row,
        )
    first, later = found.pop(0), max(found, key=lambda k: found[k])
    # noise of longer contexts is more: each length has its own, and one that was not measured has the largest
    most = max(noise.values(), default=0.0)
    spared = within_floor(first, noise.get(0, 0.0), drift.limits) or first < 0.01 * found[later]
    grown = [k for k, v in found.items() if not within_floor(v, noise.get(k, most), drift.limits)]
    fails = bool(grown) and spared
    words = ", ".join(f"{name}: {number(v)}" for name, (v, _) in table.items())
    words = f"Δ²/2 by tokens of context: {words}"
    if fails:
        words += f"; none where attention sees one token, over the noise from {bucket_name(min(grown))} tokens on"
    return Row(
        verdict=RowVerdict.FAIL if fails else RowVerdict.PASS, statistic="Δ²/2 of the worst length, nats",
        value=found[later], floor=noise.get(later), worst=max(v for v in found.values()), evidence=words,
        fix=_SAME_CONFIG if fails and configs_differ else _ONE_CONFIG if fails else "", **row,
    )  # fmt: skip


def _model(drift: Drift, blamed: Sequence[str]) -> Row:
    fails = drift.before_sampling and not blamed
    if drift.excessive and not drift.before_sampling:
        words = "by prefill the engine computes the reference's function: what differs comes after, in decoding, in "
        words += "sampling or in what is reported (see logprob_meaning, sampling, prefill_decode)"
    elif not drift.excessive:
        words = f"the drift is noise of {drift.floors.engine_dtype}: within {drift.limits.k:g} x its floor"
    elif blamed:
        words = f"over the noise of {drift.floors.engine_dtype}; see {', '.join(blamed)}"
    else:
        words = (
            f"over the noise of {drift.floors.engine_dtype}, and none of the mechanisms above explains it: on these "
            "weights the engine computes another function"
        )
    return Row(
        id="model", title="drift that no mechanism explains", statistic="mean Δ²/2 by prefill, nats",
        value=drift.gaps.half_square, floor=drift.floors.engine.half_square,
        verdict=RowVerdict.FAIL if fails else RowVerdict.PASS, evidence=words,
        fix="compare the two implementations module by module: norms, activation, biases, attention scale"
        if fails else "", **_common(drift),
    )  # fmt: skip
