"""Do transformers and the installed vLLM compute one law? A tiny random model of each architecture is loaded by both,
in fp32, and compared over the whole vocabulary: by prefill, by decoding, and after a weight sync. Needs no network."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

from ..files import write_atomic
from ..lines import progress_bar

SHORT = "which architectures transformers and vLLM compute alike"

EXAMPLES = """examples:
  trl-parity atlas --models qwen3 gemma2 cohere2
  trl-parity atlas --output atlas            # all that the installed vLLM serves; goes on where it was killed

exit codes: 0 all that could be compared agree; 1 one of them deviates; 2 nothing could be compared, or not all of
            --models"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--models", nargs="+", default=[], metavar="TYPE", help="model_type of their config.json (default: all)")
    add("--output", metavar="DIR", help="atlas.md and a file of each architecture go here")
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds a model may take (default: 300)")
    add("--json", action="store_true", help="print a JSON object a line instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    warnings.simplefilter("ignore")
    from ..preflight.atlas.atlas import run_atlas, table

    directory = Path(options.output) if options.output else None
    with progress_bar("atlas", logged=True) as update, redirect_stdout(sys.stderr):
        rows = run_atlas(
            options.models, directory, timeout=options.timeout, update=lambda what, done, of: update(done, of, what)
        )
    if directory is not None:
        write_atomic(directory / "atlas.md", table(rows))
    sys.stdout.write("".join(json.dumps(asdict(row)) + "\n" for row in rows) if options.json else table(rows))
    compared = [row for row in rows if row.prefill is not None]
    if any(row.outcome == "deviates" for row in rows):
        return 1
    return 2 if not compared or (options.models and len(compared) < len(rows)) else 0
