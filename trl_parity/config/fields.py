"""Settings as dataclass fields, declared once: what is checked of them, and the arguments they make on a command line.

    max_tokens: Annotated[int, at_least(1)] = field(default=16, metadata={"help": "sampled after a prompt"})

A bound stands beside the type and not in the metadata: TrlParser hands all of that to argparse. It is made outside the
annotation where it is a function: one in there would not see the module's names.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from ..errors import ConfigError
from .rules import nearest

__all__ = ["SHARE", "Bound", "add_arguments", "at_least", "check_fields", "default_of", "from_arguments", "number"]

T = TypeVar("T")


class Bound(NamedTuple):
    """What a setting must be."""

    holds: Callable[[Any], bool]
    expected: str  # in words


def at_least(least: int) -> Bound:
    """A whole number, ``least`` or more."""

    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return Bound(holds, f"a whole number >= {least}")


def number(holds: Callable[[float], bool], expected: str) -> Bound:
    """A number, whole or not, of which ``holds`` is true."""

    def fits(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and holds(value)

    return Bound(fits, expected)


SHARE = number(lambda x: 0 <= x <= 1, "a number from 0 to 1")


def check_fields(settings: Any) -> None:
    """Raise ConfigError for the first field of a dataclass that is none of its choices, or out of its bound."""
    for name, bound, choices in _checked(type(settings)):  # type: ignore[arg-type] # a class is hashable
        value = getattr(settings, name)
        if choices and value not in choices:
            raise ConfigError(
                f"{name} is {value!r}{nearest(str(value), choices)}. Expected one of: {', '.join(choices)}."
            )
        if bound is not None and not bound.holds(value):
            raise ConfigError(f"{name} is {value!r}. Expected {bound.expected}.")


def _or_none(bound: Bound) -> Bound:
    return Bound(lambda value: value is None or bound.holds(value), f"{bound.expected}, or none")


@cache
def _checked(settings: type) -> list[tuple[str, Bound | None, tuple[str, ...]]]:
    """Name, bound and choices of the fields that have any."""
    hints = get_type_hints(settings, include_extras=True)
    found = []
    for f in fields(settings):
        kind, *extras = get_args(hints[f.name]) or (hints[f.name],)
        bound = next((extra for extra in extras if isinstance(extra, Bound)), None)
        if bound is not None and type(None) in get_args(kind):
            bound = _or_none(bound)
        choices = tuple(f.metadata.get("choices", ()))
        if bound is not None or choices:
            found.append((f.name, bound, choices))
    return found


def add_arguments(parser: argparse.ArgumentParser, settings: type) -> None:
    """An argument for each field with a help text: ``--max-tokens`` for ``max_tokens``, or its metadata's ``flag``."""
    hints = get_type_hints(settings)
    for f in fields(settings):
        if "help" not in f.metadata:
            continue
        flag, default = f.metadata.get("flag", f"--{f.name.replace('_', '-')}"), default_of(f)
        more = {key: f.metadata[key] for key in ("metavar", "choices") if key in f.metadata}
        if hints[f.name] is bool:
            assert default is True, f.name
            parser.add_argument(f"--no-{f.name}", dest=f.name, action="store_false", help=f"not {f.metadata['help']}")
            continue
        kinds = [kind for kind in get_args(hints[f.name]) or (hints[f.name],) if kind not in (type(None), Ellipsis)]
        if get_origin(hints[f.name]) is tuple:
            more |= {"nargs": f.metadata.get("nargs", "*")}
        if default is MISSING:
            more |= {"required": True}
        else:
            more |= {"default": default}
        parser.add_argument(flag, dest=f.name, type=kinds[0], help=f.metadata["help"] + _told(default), **more)


def from_arguments(settings: type[T], options: argparse.Namespace, **more: Any) -> T:
    """The settings as ``add_arguments`` let them be given, and ``more``."""
    given = {f.name: getattr(options, f.name) for f in fields(settings) if "help" in f.metadata}  # type: ignore[arg-type]
    return settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, **more)


def default_of(f: Field[Any]) -> Any:
    """A field's default, MISSING where it has none."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def _told(default: Any) -> str:
    """What a help text says of a default, after itself."""
    if default is MISSING or default is None or default == ():
        return ""
    if isinstance(default, tuple):
        return f" (default: {' '.join(map(str, default))})"
    return f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
