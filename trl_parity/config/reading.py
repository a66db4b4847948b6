"""Settings as people write them: a YAML file, ``--set NAME=VALUE``, or JSON on a command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

__all__ = ["assignments", "from_json", "from_yaml", "read_mapping", "read_text", "settings"]

_FLOAT = "tag:yaml.org,2002:float"
_DATE = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the scalars of YAML 1.2's core schema: ``1e-3`` is a number, as in JSON, where PyYAML wants
    ``1.0e-3``; a date is text. No setting is a date, a name may look like one, and what PyYAML makes of dates is
    changed for a whole process by lm-format-enforcer, which vLLM imports for structured outputs."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_FLOAT, _DATE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

_Loader.add_implicit_resolver(  # after whole numbers, which are tried first
    _FLOAT,
    re.compile(
        r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$
        |[-+]?\.(?:inf|Inf|INF)$
        |\.(?:nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def from_yaml(text: str, where: str) -> Any:
    """What a YAML text says. Raises ConfigError."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as e:  # ValueError: a number that is none, say 0x_
        raise ConfigError(f"{where} is not valid YAML: {e}") from e


def from_json(text: str, where: str) -> Any:
    """What a JSON text says. Raises ConfigError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{where} is not valid JSON ({e}): {text!r}.") from e


def read_text(path: str | Path, expected: str, hint: str = "") -> str:
    """A file of settings as text. ``expected``: what it should be, for the error."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}{hint}. Expected {expected}.") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not valid YAML: {e}") from e


def read_mapping(path: str | Path, example: str) -> dict[str, Any]:
    """The settings of a YAML file; of an empty one, none. ``example``: a line of it, for the error."""
    values = from_yaml(read_text(path, "a YAML file of settings"), str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}. Expected a mapping such as {example!r}.")
    return values


def assignments(items: Sequence[str], example: str) -> list[tuple[str, Any]]:
    """``--set NAME=VALUE`` as given, values read as YAML, in order. Raises ConfigError."""
    found = []
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {item!r} has no '='. Expected NAME=VALUE, e.g. --set {example}.")
        found.append((name.strip(), from_yaml(value, f"--set {item!r}")))
    return found


def settings(items: Sequence[str], example: str) -> dict[str, Any]:
    """The same as a mapping: the last of one name counts."""
    return dict(assignments(items, example))
