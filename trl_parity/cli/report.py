"""Tell what a run or an incident amounts to: healthy or not, since when, and why.

DIR is the folder of a run (its output_dir, or parity/ in it) or of an incident (parity/incidents/step-<n>). Without
options the report goes to the terminal; --html writes one self-contained page with pictures, the worst sequences
coloured by Δ, settings and versions; --markdown writes the same as Markdown, its pictures beside it. Needs none of
torch, vllm and wandb; pictures need matplotlib."""

from __future__ import annotations

import argparse
from pathlib import Path

SHORT = "tell what a run or an incident amounts to"

EXAMPLES = """examples:
  trl-parity report runs/mine
  trl-parity report runs/mine --html report.html
  trl-parity report runs/mine/parity/incidents/step-17 --markdown incident.md
  trl-parity report runs/mine --markdown - | less     # words only

exit codes: 0 the report was made, whatever it says; 2 the input can't be used"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", metavar="DIR", help="folder of a run or of an incident")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained HTML page")
    parser.add_argument("--markdown", metavar="FILE", help="write Markdown, and pictures beside it; '-': to stdout")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from ..report.summary import summarize

    summary = summarize(options.path)
    if not options.html and not options.markdown:
        from rich.console import Console

        from ..report.terminal import print_summary

        print_summary(summary, Console(highlight=False))
        return 0
    from ..report.markdown import markdown_parts

    if options.markdown == "-" and not options.html:
        print("".join(markdown_parts(summary, ())))
        return 0
    from ..report.drawing import draw
    from ..report.figures import REPORT_PICTURES

    pictures, note = draw(REPORT_PICTURES, summary)
    parts = markdown_parts(summary, list(pictures), note)
    text = summary.incident is not None and not summary.incident.redacted
    if options.html:
        from ..files import write_atomic
        from ..report.html import render_page, tokens_html
        from ..report.summary import headline

        head, _, tail = parts
        sequences = [] if summary.incident is None else [tokens_html(summary.tokens, summary.incident.redacted)]
        title = f"trl-parity: {headline(summary)[0]}, {summary.path}"
        write_atomic(Path(options.html), render_page(title, [head, *sequences, tail], pictures), private=text)
        told(Path(options.html), note)
    if options.markdown:
        write_markdown(Path(options.markdown), "".join(parts), pictures, private=text)
        told(Path(options.markdown), note)
    return 0


def write_markdown(file: Path, text: str, pictures: dict[str, bytes], *, private: bool = False) -> None:
    """The Markdown, and its pictures in a folder ``<name>-pictures`` beside it."""
    from ..files import write_atomic

    folder = file.with_name(f"{file.stem}-pictures")
    for name, png in pictures.items():
        write_atomic(folder / name, png)
        text = text.replace(f"]({name})", f"]({folder.name.replace(' ', '%20')}/{name})")
    write_atomic(file, text, private=private)


def told(file: Path, note: str) -> None:
    """Say what was written, and what is missing in it."""
    import sys

    print(f"wrote {file}")
    if note:
        print(f"trl-parity: {note}", file=sys.stderr)
