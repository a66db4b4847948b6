"""Settings as people write them: ``--set NAME=VALUE``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError


def settings(items: Sequence[str], example: str) -> dict[str, Any]:
    """``--set NAME=VALUE`` as given, values read as YAML. Raises ConfigError."""
    import yaml

    values = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r} has no '='. Expected NAME=VALUE, e.g. --set {example}.")
        try:
            values[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise ConfigError(f"--set {item!r} is not valid YAML: {e}") from e
    return values
