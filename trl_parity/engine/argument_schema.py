"""What the installed vLLM takes as engine arguments: names, types, ranges, and where a live engine keeps each.

Nothing is copied by hand. ``vllm.EngineArgs`` is a plain dataclass that checks nothing; the type and range of an
argument stand in the config class that it ends up in (``CacheConfig.block_size > 0``), which pydantic checks only when
an engine is built. So each argument is led back to that class, and its value put to pydantic alone.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import importlib
import importlib.util
import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

__all__ = [
    "Argument",
    "arguments",
    "environment",
    "installed",
    "refusal",
    "sampling_names",
    "serve_names",
    "wrong_value",
]


def installed() -> str | None:
    """Version of the installed vLLM; None without one."""
    if importlib.util.find_spec("vllm") is None:
        return None
    import vllm

    return str(vllm.__version__)


@dataclass(frozen=True, slots=True)
class Argument:
    """One engine argument. ``section`` and ``attribute``: its place in a live engine's ``VllmConfig``, if any."""

    name: str
    kind: Any  # the type, with pydantic's constraints; None: not known
    default: Any
    section: str | None = None
    attribute: str | None = None


@functools.cache
def arguments() -> dict[str, Argument]:
    """Every argument of ``vllm.LLM`` and ``vllm serve`` that sets the engine up, by name."""
    import vllm.config
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    classes = {name: cls for name, cls in vars(vllm.config).items() if dataclasses.is_dataclass(cls)}
    sections = {
        cls: f.name
        for f in dataclasses.fields(vllm.config.VllmConfig)
        for cls in _parts(f.type)
        if cls in classes.values()
    }
    found = {}
    written = _written_defaults(EngineArgs)
    for field in dataclasses.fields(EngineArgs):
        if field.name.startswith("_"):
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        owner, attribute = written.get(field.name, (None, field.name))
        cls = classes.get(owner or "")
        if cls is None:  # EngineArgs has a default of its own: the section with an attribute of that name
            cls = next((c for c in sections if attribute in _settable(c)), None)
        section = None if cls is None else sections.get(cls)
        kind = None if isinstance(field.type, str) else field.type  # a string: a name that only type checkers see
        limits = getattr(_settable(cls).get(attribute), "metadata", [])
        if kind is not None and limits:
            kind = Annotated[(kind, *limits)]
        found[field.name] = Argument(field.name, kind, default, section, attribute)
    for name, parameter in inspect.signature(LLM.__init__).parameters.items():
        if name == "self" or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if name not in found:  # LLM's own
            found[name] = Argument(name, None, parameter.default)
        elif _nested(found[name].kind):  # LLM makes a config object of what it is given: a number may be enough
            more = [part for part in _parts(parameter.annotation) if part in (int, type(None))]
            found[name] = dataclasses.replace(found[name], kind=Union[(found[name].kind, *more)])
    return found


def _parts(kind: Any) -> tuple[Any, ...]:
    """A type, or the members of a union."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _settable(cls: Any) -> dict[str, Any]:
    """pydantic's description of the fields of a config class that its constructor takes."""
    fields: dict[str, Any] = getattr(cls, "__pydantic_fields__", {})
    return {name: info for name, info in fields.items() if info.init is not False}


def _written_defaults(cls: Any) -> dict[str, tuple[str, str]]:
    """argument -> (config class, attribute), as EngineArgs writes its defaults: ``CacheConfig.cache_dtype`` or
    ``get_field(CacheConfig, "cache_dtype")``. There alone it says which argument became which attribute.
    """
    found = {}
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for line in tree.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        match line.value:
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute):
                found[line.target.id] = (owner, attribute)
            case ast.Call(func=ast.Name(id="get_field"), args=[ast.Name(id=owner), ast.Constant(value=attribute)]):
                found[line.target.id] = (owner, str(attribute))
    return found


def wrong_value(argument: Argument, value: Any) -> str:
    """What is wrong with a value, in words that begin with "Expected"; empty where nothing is."""
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    if argument.kind is None or value == argument.default:
        return ""
    if isinstance(value, str) and any(value.upper() in names for names in _enum_names(argument.kind)):
        return ""  # vLLM takes a member of an enum by its name
    try:
        adapter = TypeAdapter(argument.kind, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a dataclass brings a config of its own
        adapter = TypeAdapter(argument.kind)
    try:
        text = json.dumps(value)
    except TypeError:  # an object that no YAML holds: a torch.dtype, a callable
        text = None
    try:
        # as JSON: lists become sets, strings become enums; strictly: "4" is no number, 1 is no boolean
        adapter.validate_python(value) if text is None else adapter.validate_json(text, strict=True)
    except ValidationError as e:
        return _in_words(e, argument)
    return ""


def _enum_names(kind: Any) -> Iterable[Iterable[str]]:
    return [part.__members__ for part in _parts(kind) if isinstance(part, enum.EnumType)]


def _in_words(e: Any, argument: Argument) -> str:
    names = [name for names in _enum_names(argument.kind) for name in names]
    if names:
        return f"Expected one of: {', '.join(names)}."
    said = []
    for error in e.errors():
        if error["type"] == "is_instance_of" or error["type"].startswith("callable"):
            continue  # of a union: what only Python can hold
        inside = [
            str(part)
            for part in error["loc"]
            if "[" not in str(part) and not str(part)[:1].isupper() and part != "int"
        ]
        if error["type"] == "unexpected_keyword_argument":
            said.append(f"no {inside[-1]!r} in it")
        else:
            message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            said.append(f"{message} for {'.'.join(inside)!r}" if _nested(argument.kind) and inside else message)
    return f"Expected {' or '.join(dict.fromkeys(said))}."


def _nested(kind: Any) -> bool:
    return any(dataclasses.is_dataclass(part) for part in _parts(kind))


@functools.cache
def serve_names() -> frozenset[str]:
    """Arguments of ``vllm serve`` that are not the engine's: host, port, API key and the like."""
    moved = "vllm.entrypoints.launchers"  # after vLLM 0.27
    home = moved if importlib.util.find_spec(moved) else "vllm.entrypoints.openai"
    frontend = importlib.import_module(f"{home}.cli_args").FrontendArgs
    return frozenset(f.name for f in dataclasses.fields(frontend)) - arguments().keys()


@functools.cache
def sampling_names() -> frozenset[str]:
    """Settings of a request, not of the engine."""
    from vllm import SamplingParams

    return frozenset(inspect.signature(SamplingParams).parameters) - arguments().keys()


@functools.cache
def environment() -> frozenset[str]:
    """Environment variables that vLLM reads."""
    import vllm.envs

    return frozenset(vllm.envs.environment_variables)


def refusal(args: Mapping[str, Any], *, whole: bool = False) -> str:
    """What vLLM says when ``EngineArgs`` is made of these arguments; empty where it takes them.

    ``whole``: and its whole configuration of that, as before an engine is built. Then the model's config is read, but
    nothing is loaded; environment variables that vLLM's workers read may be set.
    """
    from vllm.engine.arg_utils import EngineArgs

    names = EngineArgs.__dataclass_fields__
    given = {"model": "."} | {name: value for name, value in args.items() if name in names}  # offline it has to exist
    try:
        made = EngineArgs(**given)
        if whole:
            made.create_engine_config()
    except Exception as e:  # anything: pydantic's, a missing model's, an assertion
        words = str(e).split("[type=")[0]
        return " ".join(f"{type(e).__name__}: {words}".split())
    return ""
