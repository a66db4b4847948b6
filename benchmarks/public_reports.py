"""Mismatches that people reported, made again on the real stack, and what is said of each: a Markdown table.

    python benchmarks/public_reports.py                       # all of them, a few minutes
    python benchmarks/public_reports.py --only raw-logprobs

A report is made again by a drill (recipes/drill): one setting or one small patch of real TRL and real vLLM. What the
report is about stands here in our words; its address is the source.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from detection import run_drills


class Report(NamedTuple):
    """A public report and the drill that makes it again."""

    source: str  # address
    title: str
    seen: str
    drill: str
    cause: str  # what should be named


GITHUB = "https://github.com/"
REPORTS = (
    Report(GITHUB + "huggingface/trl/issues/4159", "TRL #4159",
           "at temperature 0.6 the first tokens' ratios are about 2: vLLM tells log-probs from before temperature",
           "raw-logprobs", "raw_logprobs"),
    Report(GITHUB + "huggingface/trl/issues/6945", "TRL #6945",
           "with top-p the two sides normalize over different vocabularies, and ratios carry the mass cut off",
           "top-p", "truncated_sampling"),
    Report(GITHUB + "NVIDIA-NeMo/RL/issues/3497", "NeMo RL #3497",
           "vLLM takes a repetition penalty from the model's generation_config.json; the trainer knows none",
           "repetition-penalty", "penalties"),
    Report(GITHUB + "OpenPipe/ART/pull/140", "ART #140",
           "since the same change of vLLM's defaults, top-k and temperature of that file reach requests that set none",
           "hidden-top-k", "truncated_sampling"),
    Report(GITHUB + "PrimeIntellect-ai/prime-rl/pull/1650", "prime-rl #1650",
           "the prefix cache is kept over weight updates, and KL grows",
           "kept-prefix-cache", "stale_prefix_cache"),
    Report(GITHUB + "verl-project/verl/issues/7495", "verl #7495",
           "syncs deliver nothing that training moved: the engine keeps the first policy; it looks like staleness",
           "lost-sync", "stale_weights"),
    Report(GITHUB + "stanford-cs336/assignment5-alignment/issues/15", "cs336 #15",
           "completions are tokenized anew, so log-probs lie beside other tokens",
           "shifted-logprobs", "token_misalignment"),
    Report("https://arxiv.org/abs/2506.13585", "MiniMax-M1",
           "the engine's lm_head in half precision keeps rewards from growing; in fp32 the two sides agree",
           "bf16-head", "head_precision"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="DRILL", choices=[report.drill for report in REPORTS])
    options = parser.parse_args()
    reports = [report for report in REPORTS if not options.only or report.drill in options.only]
    options.only, options.seeds, options.temperatures = [report.drill for report in reports], [0], [0.7]
    found = {run["drill"]: run for run in run_drills(options)["runs"]}
    print("| report | what was seen | made again by | windows to the halt | named | confidence |")
    print("|---|---|---|---|---|---|")
    for report in reports:
        run = found[report.drill]
        named = f"`{run['named']}`" + ("" if run["named"] == report.cause else f", expected `{report.cause}`")
        confidence = "-" if run["confidence"] is None else f"{run['confidence']:.0%}"
        print(f"| [{report.title}]({report.source}) | {report.seen} | `trl-parity drill {report.drill}` | "
              f"{run['windows'] if run['windows'] is not None else 'none'} | {named} | {confidence} |")  # fmt: skip


if __name__ == "__main__":
    main()
