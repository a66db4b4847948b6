"""The engine against a stored reference: the log-probs of the very tokens it holds, and a bound of the KL."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from ...engine.offline import BenchEngine
from ...report.format import number
from ..baseline.baseline import Baseline
from .invariances import Noise
from .rows import Row, RowVerdict, within_floor
from .sampling import own_laws
from .statistics import Sums, coarse_kl

__all__ = ["baseline_row"]

_ROWS = 256

_LAWS = 12  # contexts whose top-k is compared with the engine's whole law

_TOKENS = 4096  # in one call of the engine


def baseline_row(engine: BenchEngine, baseline: Baseline, noise: Noise, half_square: float) -> Row:
    """Log-probs of the stored tokens under the engine's prefill. ``half_square``: noise of mean Δ² / 2."""
    every = max(1, len(baseline) // _ROWS)
    kept = [row for row in islice(baseline.rows(), 0, None, every) if row["token_ids"]]
    fitting = [r for r in kept if len(r["prompt_ids"]) + len(r["token_ids"]) < engine.max_model_len][:_ROWS]
    common: dict[str, Any] = {"id": "baseline", "group": "baseline", "title": f"stored reference {baseline.directory}"}
    if not fitting:
        return Row(
            verdict=RowVerdict.NOT_RUN, evidence=f"none of its {len(baseline):,} answers fits max_model_len", **common
        )
    gaps = []
    for part in _parts(fitting):
        for row, scores in zip(part, engine.rescore([r["prompt_ids"] + r["token_ids"] for r in part]), strict=True):
            told = torch.tensor(row["logprobs"], dtype=torch.float64)
            gaps.append(scores.double()[-len(told) :] - told)
    delta = torch.cat(gaps)
    halves = Sums.of(delta.square() / 2)
    some = fitting[:_LAWS]
    laws = own_laws(engine, [r["prompt_ids"] for r in some])
    top = torch.tensor([r["topk_ids"][0] for r in some])
    bound = coarse_kl(laws.gather(-1, top), torch.tensor([r["topk_logprobs"][0] for r in some]))
    fails = not within_floor(halves.mean, half_square, noise.limits)
    dtype = baseline.manifest.get("settings", {}).get("dtype") or baseline.manifest.get("dtype")
    sizes = delta.abs()
    return Row(
        statistic="mean Δ²/2, nats", value=halves.mean, floor=half_square, worst=halves.maximum,
        limit=max(noise.limits.least_kl, noise.limits.k * half_square), tokens=len(delta), trials=len(fitting),
        verdict=RowVerdict.FAIL if fails else RowVerdict.PASS,
        evidence=f"{len(fitting)} of {len(baseline):,} answers, dtype {dtype}: mean |Δ| "
        f"{number(float(sizes.mean()))}, largest {number(float(sizes.max()))}; KL at least "
        f"{number(float(bound.mean()))} (the stored top {top.shape[1]} and the rest as one, on {len(some)} contexts)",
        fix="the weights and settings the baseline was made with, or a new baseline" if fails else "", **common,
    )  # fmt: skip


def _parts(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    parts: list[list[dict[str, Any]]] = [[]]
    tokens = 0
    for row in rows:
        size = len(row["prompt_ids"]) + len(row["token_ids"])
        if parts[-1] and tokens + size > _TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(row)
        tokens += size
    return parts
