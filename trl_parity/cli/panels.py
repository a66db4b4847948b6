"""Make a W&B workspace view with sections Health, Drift, Policy, Engine and Tokens. A view with the same
content is found again and left as it is, your edits included; a later version with other content makes another."""

from __future__ import annotations

import argparse

SHORT = "make the ready-made W&B workspace of a project"

EXAMPLES = """examples:
  trl-parity panels --project trl-parity
  trl-parity panels --project rl --entity my-team

exit codes: 0 the view is there, made now or before; 2 W&B can't be asked, or refuses"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--project", required=True, help="W&B project")
    parser.add_argument("--entity", help="W&B user or team (default: your own)")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from ..tracking.workspace import create

    url, made = create(options.project, options.entity)
    print(("made" if made else "already there, left as it is") + f": {url}")
    return 0
