"""Settings as people write them: a YAML file, ``--set NAME=VALUE``, or JSON on a command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from ..files import DEEPEST, read_bytes, require_bounded

__all__ = ["assignments", "from_json", "from_yaml", "read_mapping", "read_text", "settings"]

MAX_TEXT, MAX_VALUES = 1 << 20, 100_000  # bytes of settings, and values in them, each alias counted where it stands

_FLOAT = "tag:yaml.org,2002:float"
_DATE = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the scalars of YAML 1.2's core schema: ``1e-3`` is a number, as in JSON, where PyYAML wants
    ``1.0e-3``; a date is text. No setting is a date, a name may look like one, and what PyYAML makes of dates is
    changed for a whole process by lm-format-enforcer, which vLLM imports for structured outputs.

    Values are counted while they are composed, before any is made: an alias counts for all that it stands for."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._sizes: dict[int, int] = {}  # of the nodes that hold others, by id
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._depth >= DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} deep")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        sizes = self._sizes
        if id(node) not in sizes and isinstance(node, yaml.CollectionNode):
            inside = [x for pair in node.value for x in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] = 1 + sum(sizes.get(id(x), 1) for x in inside)
            if sizes[id(node)] > MAX_VALUES:
                raise yaml.composer.ComposerError(None, None, f"more than {MAX_VALUES:,} values", node.start_mark)
        return node


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
        value = yaml.load(text, _Loader)
        require_bounded(value, MAX_VALUES)  # one that holds itself goes on and on
        return value
    except RecursionError as e:
        raise ConfigError(f"{where} is not valid YAML: it is nested too deep") from e
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
        return read_bytes(Path(path), MAX_TEXT).decode("utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}{hint}. Expected {expected}.") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not valid YAML: {e}") from e
    except ValueError as e:
        raise ConfigError(f"{path} has {e}. Expected {expected}, of at most {MAX_TEXT:,}.") from e


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
