"""Settings declared once: bounds beside the type, checked alike everywhere, and the arguments they make."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, get_type_hints

import pytest

from trl_parity import ParityConfig
from trl_parity.config.fields import SHARE, add_arguments, at_least, check_fields, from_arguments, number
from trl_parity.errors import ConfigError
from trl_parity.preflight.baseline.settings import Generation
from trl_parity.preflight.check.rows import Limits
from trl_parity.preflight.check.settings import CheckSettings

SECONDS = number(lambda x: x > 0, "seconds, more than 0")


@dataclass(frozen=True, kw_only=True)
class Some:
    name: str = field(metadata={"help": "of it"})
    count: Annotated[int, at_least(2)] = field(default=3, metadata={"help": "how many", "metavar": "N"})
    limit: Annotated[int | None, at_least(1)] = field(default=None, metadata={"help": "at most"})
    share: Annotated[float, SHARE] = field(default=0.25, metadata={"help": "of all", "flag": "--part"})
    wait: Annotated[float, SECONDS] = 1.0
    kind: str = field(default="a", metadata={"help": "which", "choices": ["a", "bold"]})
    seeds: tuple[int, ...] = field(default=(0, 1), metadata={"help": "one each"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "not these", "nargs": "+"})
    greedy: bool = field(default=True, metadata={"help": "the greedy one"})

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"count": 1}, r"count is 1\. Expected a whole number >= 2\."),
        ({"count": True}, r"count is True\. Expected a whole number >= 2\."),
        ({"count": 2.0}, r"count is 2\.0\. Expected a whole number"),
        ({"count": None}, r"count is None\. Expected a whole number"),
        ({"limit": 0}, r"limit is 0\. Expected a whole number >= 1, or none\."),
        ({"share": 1.5}, r"share is 1\.5\. Expected a number from 0 to 1\."),
        ({"share": float("nan")}, "share is nan"),
        ({"share": "0.5"}, "share is '0.5'"),
        ({"wait": 0}, r"wait is 0\. Expected seconds, more than 0\."),
        ({"kind": "bald"}, r"kind is 'bald' \(did you mean 'bold'\?\)\. Expected one of: a, bold\."),
        ({"kind": ["a"]}, "kind is "),
    ],
)
def test_the_first_wrong_field_is_named(given, words):
    with pytest.raises(ConfigError, match=words):
        Some(name="x", **given)
    Some(name="x", count=2, limit=None, share=1, wait=0.5, kind="bold")


def test_fields_make_arguments_and_come_back():
    parser = argparse.ArgumentParser()
    add_arguments(parser, Some)
    assert from_arguments(Some, parser.parse_args(["--name", "x"]), wait=2.0) == Some(name="x", wait=2.0)
    given = "--name y --count 4 --limit 5 --part 0.5 --kind bold --seeds 7 8 --skip u v --no-greedy"
    assert from_arguments(Some, parser.parse_args(given.split())) == Some(
        name="y", count=4, limit=5, share=0.5, kind="bold", seeds=(7, 8), skip=("u", "v"), greedy=False
    )
    told = " ".join(parser.format_help().split())
    for words in ("--count N how many (default: 3)", "(default: 0.25)", "(default: 0 1)", "not the greedy one"):
        assert words in told
    with pytest.raises(SystemExit):
        parser.parse_args([])  # --name has no default
    with pytest.raises(ConfigError, match="count is 1"):
        from_arguments(Some, parser.parse_args(["--name", "x", "--count", "1"]))


@pytest.mark.parametrize("settings", [CheckSettings, Limits, Generation])
def test_the_commands_defaults_are_the_dataclasses(settings):
    parser = argparse.ArgumentParser()
    add_arguments(parser, settings)
    required = {"model": "m"} if settings is CheckSettings else {}
    options = parser.parse_args([word for name, value in required.items() for word in (f"--{name}", value)])
    assert from_arguments(settings, options) == settings(**required)


def test_a_parser_of_dataclasses_sees_plain_types_and_no_bounds():
    hints = get_type_hints(ParityConfig)
    assert hints["every_n_steps"] is int
    assert hints["floor_cost_share"] is float
    assert {key for f in ParityConfig.__dataclass_fields__.values() for key in f.metadata} == {"help", "choices"}


def test_the_command_line_is_made_without_torch():
    code = (
        "import sys\nfrom trl_parity.cli import main\n"
        "try:\n    main(['check', '--help'])\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
