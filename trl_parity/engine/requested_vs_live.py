"""What an engine was asked for, against what it runs with: the same judgement for one in this process and a server."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

from ..credentials import HIDDEN, without_credentials
from .argument_schema import arguments
from .base import Engine

__all__ = ["differences"]

_ABSENT = object()

_ALIASES = {"half": "float16", "float": "float32"}


def differences(asked: Mapping[str, Any], engine: Engine) -> Iterator[tuple[str, Any, Any]]:
    """Each argument that the engine runs with otherwise: its name, what was asked, what it is.

    Not compared: what was left to vLLM (``auto``, None, a length of -1), and what an engine does not tell.
    """
    known = arguments()
    for name, value in asked.items():
        argument = known.get(name)
        if argument is None or argument.section is None or value is None or value == "auto" or name == "model":
            continue
        if name == "max_model_len" and value == -1:
            continue
        if HIDDEN in str(without_credentials({name: value})):  # no matter of numerics, and not to be told
            continue
        if name == "hf_overrides":
            yield from _overrides(value, engine)
            continue
        live = _plain(engine.setting(argument.section, argument.attribute or name, _ABSENT))
        if live is not _ABSENT and not _same(_plain(value), live):
            yield name, value, live


def _overrides(asked: Any, engine: Engine) -> Iterator[tuple[str, Any, Any]]:
    if not isinstance(asked, Mapping):  # a callable
        return
    for key, value in asked.items():
        if key == "head_dtype":
            live: Any = _plain(engine.head_dtype)
            if value == "model":
                value = _plain(engine.dtype)
        else:
            live = _plain(engine.model_setting(key, _ABSENT))
        if live is not _ABSENT and not _same(_plain(value), live):
            yield f"hf_overrides.{key}", value, live


def _plain(value: Any) -> Any:
    """As JSON and YAML would have it."""
    if isinstance(value, enum.Enum):
        return value.name
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
    if isinstance(value, str):
        value = value.removeprefix("torch.")
        return _ALIASES.get(value, value)
    return value


def _same(asked: Any, live: Any) -> bool:
    if isinstance(asked, Mapping) and isinstance(live, Mapping):  # of a mapping only what was asked
        return all(_same(_plain(value), _plain(live[key])) for key, value in asked.items() if key in live)
    if isinstance(asked, str) and isinstance(live, str):
        # members of an enum by name or by the path of what they stand for; "fp8" is fp8_e4m3 or what the platform has
        asked, live = asked.lower(), live.lower()
        return asked == live or live.endswith("." + asked) or (asked == "fp8" and live.startswith("fp8"))
    return bool(asked == live)
