"""How often the sequential tests condemn a healthy run, and how many windows a faint fault takes them.

    python benchmarks/evidence.py --quick              # 10^5 null windows
    python benchmarks/evidence.py                      # 3.25 x 10^6: 13 kinds of healthy runs, 500 of each
    python benchmarks/evidence.py --json evidence.json

Simulated tokens, the code of ``trl_parity.judging.evidence``, runs in lockstep. The Δ of a sequence are drawn so that
the mean ratio is exactly 1 (normal, mean -s²/2, deviation s), with s fixed, different for each token (heavy tails) or
for each sequence; a window's level can vary by itself or as an autoregressive process. A token's law is one likely
token and 50 equally unlikely ones, of a probability that differs by token and sequence. Windows are drawn from pools
of 5,000 sequences. The noise floor is measured once a run, on few sequences, and never again. The first table counts
runs in which a test's evidence ever reached 1/alpha, at alpha = 0.0001, the default, and at 0.05, where chance shows:
each test may have alpha / 4 of the runs. The second gives windows from the beginning of a fault to the decision,
beside the fixed rules, three breached windows in a row.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from trl_parity.config.rules import DEFAULT_RULES
from trl_parity.judging.betting import CLIP
from trl_parity.judging.evidence import TESTS, Evidence

SCALE = 0.02  # of Δ, nats: mean |Δ| 0.016, k3 2e-4

LEVELS = np.exp(np.arange(-6, 8) * 0.15)  # levels of windows, in units of SCALE: a pool for each

POOL, LONGEST = 5_000, 100

FIELDS = ("tokens", "clipped", "clipped_square", "w", "delta", "abs_delta", "k3", "entropy", "entropy_drift")

RARE = 50  # unlikely tokens of a law

RULES = {rule.stat: rule for rule in DEFAULT_RULES}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How runs look."""

    name: str
    sequences: int = 32
    tails: float = 0.0  # deviation of log s over tokens
    by_sequence: float = 0.0  # and over sequences
    by_window: float = 0.0  # deviation of a window's log level
    memory: float = 0.0  # lag-1 correlation of that level
    floor_sequences: int = 16
    peeking: bool = False  # a sequence ends at its first large Δ
    glitch: float = 0.0  # every 100th window or so has a token with this Δ or its negative
    level: float = 1.0
    bias: float = 0.0  # of log w, every token
    rare: float = 0.2  # probability of the unlikely tokens together: its median over tokens
    withheld: float = 0.0  # share of them that the engine never draws, and whose probability it does not tell
    errors: bool = True  # windows come with standard errors
    floor: bool = True


def pools(kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Sums by sequence: (levels, POOL, fields)."""
    out = []
    for level in LEVELS if kind.by_window else [1.0]:
        s = np.full((POOL, LONGEST), SCALE * level * kind.level)
        s *= np.exp(kind.by_sequence * (rng.standard_normal((POOL, 1)) - kind.by_sequence / 2))
        s *= np.exp(kind.tails * (rng.standard_normal(s.shape) - kind.tails / 2)) if kind.tails else 1.0
        delta = s * rng.standard_normal(s.shape) - s**2 / 2
        lengths = rng.integers(10, LONGEST, POOL)
        if kind.peeking:
            large = delta > 1.5 * s
            lengths = np.where(large.any(1), large.argmax(1) + 1, LONGEST)
        mask = np.arange(LONGEST) < lengths[:, None]
        delta = (delta + kind.bias) * mask
        w = np.exp(delta)
        x = (np.minimum(w, CLIP) - 1.0) * mask
        rare = np.minimum(
            kind.rare * np.exp(rng.standard_normal(s.shape) + 0.5 * rng.standard_normal((POOL, 1))), 0.95
        )
        entropy = -(1.0 - rare) * np.log1p(-rare) + rare * np.log(RARE / rare)
        drawn = rng.random(s.shape) < rare * (1.0 - kind.withheld)
        drift = entropy - np.where(drawn, np.log(RARE / rare), -np.log1p(-rare))
        columns = [mask, x, x * x, w * mask, delta, np.abs(delta), w - 1.0 - delta, entropy * mask, drift * mask]
        out.append(np.stack([column.sum(1, dtype=float) for column in columns], axis=-1))
    return np.stack(out)


def measured(drawn: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Means over tokens of (runs, sequences, fields), their standard errors by sequence, and the tokens."""
    sums = drawn.sum(1)
    n, m = sums[:, 0], drawn.shape[1]
    means = dict(zip(FIELDS[1:], (sums[:, 1:] / n[:, None]).T, strict=True))
    errors = {}
    for i, name in enumerate(FIELDS[1:], 1):
        residual = drawn[:, :, i] - means[name][:, None] * drawn[:, :, 0]
        errors[name] = np.sqrt((residual**2).sum(1) * m / (m - 1)) / n
    return means, errors, n


def floors(kind: Kind, pool: np.ndarray, runs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Measured on a few sequences in each run; the upper end of a one-sided 99.9 % interval (Student's t)."""
    means, errors, _ = measured(
        pool[len(pool) // 2 - (len(pool) > 1)][rng.integers(0, POOL, (runs, kind.floor_sequences))]
    )
    out = {}
    for stat, name in (("logp_abs_diff/mean", "abs_delta"), ("kl_k3", "k3")):
        out[f"floor/{stat}"] = means[name]
        out[f"floor_upper/{stat}"] = means[name] + stats.t.isf(0.001, kind.floor_sequences - 1) * errors[name]
    return out


def simulate(
    before: Kind, after: Kind | None, start: int, windows: int, runs: int, seed: int, **settings: Any
) -> dict[str, np.ndarray]:
    """Windows until each test's evidence is at 1e4 and at 20 and until the fixed rules halt, by run; inf: never."""
    rng = np.random.default_rng(seed)
    pool = pools(before, rng)
    floor = floors(
        before if after is None else replace(before, level=1.0, bias=0.0),
        pools(replace(before, level=1.0, bias=0.0), rng),
        runs,
        rng,
    )
    sick, kind = None if after is None else pools(after, rng), before
    evidence = Evidence(shape=(runs,), **settings)
    found = {f"{test}@{limit}": np.full(runs, np.inf) for test in TESTS for limit in (4, "20")}
    found["rules"], streak, level = np.full(runs, np.inf), np.zeros(runs), np.zeros(runs)
    for t in range(windows):
        if after is not None and t == start:
            pool, kind = sick, after
        level = kind.memory * level + np.sqrt(1 - kind.memory**2) * kind.by_window * rng.standard_normal(runs)
        index = (
            np.clip(np.round(level / 0.15) + 6, 0, len(LEVELS) - 1).astype(int)
            if len(pool) > 1
            else np.zeros(runs, int)
        )
        means, errors, n = measured(pool[index[:, None], rng.integers(0, POOL, (runs, kind.sequences))])
        values = {
            "ratio/clipped": 1.0 + means["clipped"], "ratio/clipped_square": means["clipped_square"],
            "kl_k1": -means["delta"], "trimmed/logp_abs_diff/mean": means["abs_delta"], "trimmed/kl_k3": means["k3"],
            "entropy/drift": means["entropy_drift"], "entropy/trainer": means["entropy"],
        }  # fmt: skip
        if kind.floor:
            values |= floor
        ratio, ratio_error = means["w"], errors["w"]
        if kind.glitch:  # the sums that keep it: neither |Δ| nor k3, which are trimmed
            hit = (rng.random(runs) < 0.01) * np.where(rng.random(runs) < 0.5, 1.0, -1.0)
            x = np.minimum(np.exp(hit * kind.glitch), CLIP) - 1.0
            for name, more in (("ratio/clipped", x), ("ratio/clipped_square", x * x), ("kl_k1", -hit * kind.glitch)):
                values[name] = values[name] + more / n
            errors["delta"] = np.hypot(errors["delta"], np.abs(hit) * kind.glitch / n)
        if kind.errors:
            values |= {
                "se/kl_k1": errors["delta"],
                "se/logp_abs_diff/mean": errors["abs_delta"],
                "se/kl_k3": errors["k3"],
                "se/entropy/drift": errors["entropy_drift"],
            }
        evidence.update(t, n, np.full(runs, kind.sequences), values)
        for test in TESTS:
            now = evidence.bets[test].log10_evidence
            for limit, level10 in ((4, 4.0), ("20", np.log10(20.0))):
                reached = found[f"{test}@{limit}"]
                reached[(now >= level10) & np.isinf(reached)] = t + 1
        breached = np.maximum(np.abs(ratio - 1.0) - 2.576 * ratio_error, 0.0) > RULES["honesty_gap"].limit
        gap = np.abs(means["entropy_drift"]) - 2.576 * errors["entropy_drift"]
        breached |= np.maximum(gap, 0.0) > RULES["entropy/drift_gap"].limit
        if kind.floor:
            for stat, name in (("logp_abs_diff/mean", "abs_delta"), ("kl_k3", "k3")):
                rule, base = RULES[stat], floor[f"floor/{stat}"]
                breached |= means[name] - base > np.maximum(rule.limit, (rule.k - 1.0) * base)
        streak = np.where(breached, streak + 1, 0)
        found["rules"][(streak >= 3) & np.isinf(found["rules"])] = t + 1
    return found


NULLS = (
    Kind(name="normal, 32 sequences"),
    Kind(name="normal, 8 sequences, no standard errors", sequences=8, errors=False),
    Kind(name="heavy tails, 8 sequences", sequences=8, tails=1.0),
    Kind(name="noise by sequence, 8 sequences", sequences=8, by_sequence=0.5),
    Kind(name="lengths that depend on Δ, 8 sequences", sequences=8, peeking=True),
    Kind(name="levels differ by window", by_window=0.15),
    Kind(name="levels autocorrelated (0.8)", by_window=0.2, memory=0.8),
    Kind(name="floor of 4 sequences", floor_sequences=4, by_sequence=0.3),
    Kind(name="a token of e^20 now and then", sequences=8, glitch=20.0),
    Kind(name="w x 1.002, the most that does not matter", bias=np.log(1.002)),
    Kind(name="no floor, 64 sequences", sequences=64, floor=False, by_window=0.1),
    Kind(name="peaked laws, 8 sequences", sequences=8, rare=0.003),
    Kind(name="peaked laws, 4 sequences, no standard errors", sequences=4, rare=0.001, errors=False),
)


def false_alarms(runs: int, windows: int) -> list[dict[str, Any]]:
    rows = []
    for seed, kind in enumerate(NULLS):
        begun = time.perf_counter()
        found = simulate(kind, None, 0, windows, runs, seed)
        row = {"kind": kind.name, "windows": runs * windows, "runs": runs}
        row |= {name: int(np.isfinite(reached).sum()) for name, reached in found.items()}
        print(f"{row} {time.perf_counter() - begun:.0f} s", flush=True)
        rows.append(row)
    return rows


FINE = {"floor_factor": 1.0, "change_factor": 1.0, "effects": {"logp_abs_diff/mean": 1e-3, "kl_k3": 1e-5}}


def faults() -> list[tuple[str, Kind, Kind, int, dict[str, Any]]]:
    """Name, the runs before and after, the window it begins at, settings."""
    out = []
    for sequences in (8, 64):
        base = Kind(name="", sequences=sequences, by_sequence=0.3, by_window=0.1, floor_sequences=64)
        many = f"{sequences} sequences"
        for start in (0, 200):
            since = f"{many}, from window {start}"
            out.append((f"w x 1.005, {since}", base, replace(base, bias=np.log(1.005)), start, {}))
            out.append((f"w x 0.985 (top_p), {since}", base, replace(base, bias=np.log(0.985)), start, {}))
            out += [
                (f"{x:.0%} of unlikely tokens withheld, {since}", base, replace(base, withheld=x), start, {})
                for x in (0.1, 0.3)
            ]
            out += [(f"drift x {x}, {since}", base, replace(base, level=x), start, {}) for x in (1.5, 2.0)]
        fine = (f"drift x 1.2, {many}, from 200, factors 1", base, replace(base, level=1.2), 200, FINE)
        out.append(fine)
        for start in (50, 200):
            unknown = replace(base, floor=False)
            name = f"change x 1.6, {many}, from {start}, no floor"
            out.append((name, unknown, replace(unknown, level=1.6), start, {}))
    return out


def delays(runs: int, within: int) -> list[dict[str, Any]]:
    rows = []
    for seed, (name, before, after, start, settings) in enumerate(faults()):
        found = simulate(before, after, start, start + within, runs, 100 + seed, **settings)
        row: dict[str, Any] = {"fault": name}
        times = {test: found[f"{test}@4"] for test in TESTS}
        for who, reached in (*times.items(), ("any", np.min(list(times.values()), axis=0)), ("rules", found["rules"])):
            reached = reached[reached > start] - start
            row[who] = [float(x) for x in np.quantile(reached, (0.5, 0.9), method="higher")] if len(reached) else None
        print(row, flush=True)
        rows.append(row)
    return rows


def report(console: Console, alarms: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    table = Table(title="healthy runs in which evidence ever reached 1e4 (the default limit), and 20")
    for column in ("runs", "windows", *TESTS, "fixed rules"):
        table.add_column(column, justify="left" if column == "runs" else "right")
    for row in alarms:
        counts = [f"{row[f'{test}@4']}, {row[f'{test}@20']}" for test in TESTS]
        table.add_row(row["kind"], f"{row['windows']:,}", *counts, str(row["rules"]))
    runs = sum(row["runs"] for row in alarms)
    wrong = sum(row[f"{test}@4"] for row in alarms for test in TESTS)
    console.print(table)
    windows, chance = sum(row["windows"] for row in alarms), runs * 0.05 / len(TESTS)
    shares = ", ".join(f"{test} {sum(row[f'{test}@20'] for row in alarms)}" for test in TESTS)
    console.print(f"{windows:,} null windows in {runs:,} runs: {wrong} false decisions at alpha = 0.0001")
    console.print(f"at 0.05 each test may have {chance:.0f}: {shares}")
    table = Table(title="windows from a fault's beginning to the decision: median, 90th percentile")
    for column in ("fault", *TESTS, "any test", "fixed rules"):
        table.add_column(column, justify="left" if column == "fault" else "right")

    def shown(pair: list[float] | None) -> str:
        if pair is None or np.isinf(pair[0]):
            return "never"
        return " ".join("-" if np.isinf(x) else f"{x:.0f}" for x in pair)

    for row in found:
        table.add_row(row["fault"], *(shown(row[who]) for who in (*TESTS, "any", "rules")))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 runs of 100 windows of each kind, 20 of each fault")
    parser.add_argument("--runs", type=int, default=500, help="healthy runs of each kind")
    parser.add_argument("--windows", type=int, default=500, help="of each of them")
    parser.add_argument("--only", choices=["alarms", "delays"], help="one of the tables")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    options = parser.parse_args()
    runs, windows = (100, 100) if options.quick else (options.runs, options.windows)
    alarms = [] if options.only == "delays" else false_alarms(runs, windows)
    found = [] if options.only == "alarms" else delays(20 if options.quick else 100, 300)
    report(Console(width=150), alarms, found)
    if options.json:
        options.json.write_text(json.dumps({"false_alarms": alarms, "delays": found}, indent=1))


if __name__ == "__main__":
    main()
