"""Engine arguments for vLLM, checked against the vLLM that is installed before an engine is built.

A file of them is YAML: vLLM's own names, one a line. ``preset: rl`` starts from a preset; a block ``trainer:`` holds
the settings of TRL's config that belong to them (a head in fp32 is one only on both sides), and says that the file is
meant for RL. The presets are the files ``configs/vllm_*.yaml``, which a wheel holds as ``trl_parity/engine/presets``.
"""

from __future__ import annotations

import importlib.resources
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.reading import from_yaml, read_text
from ..config.rules import nearest
from ..errors import ConfigError
from .conflicts import conflicts
from .removed_arguments import RETIRED

__all__ = [
    "PRESETS",
    "EngineConfig",
    "Problem",
    "checked",
    "laid_over",
    "load_engine_args",
    "problems",
    "read_engine_config",
    "rl_engine_args",
    "serve_line",
]

PRESETS = {
    "rl": "vllm_rl.yaml",
    "throughput": "vllm_throughput.yaml",
    "long_context": "vllm_long_context.yaml",
    "mixed_cluster": "vllm_mixed_cluster.yaml",
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One file of engine arguments, read and not yet checked. ``trainer``: None where it is not meant for RL."""

    where: str
    engine: dict[str, Any]  # arguments of vllm.LLM
    trainer: dict[str, Any] | None = None  # settings of TRL's config that belong to them
    reasons: dict[str, str] = field(default_factory=dict)  # argument -> why, and what it costs


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that vLLM would refuse, ignore, or take for something else. ``names``: the arguments concerned."""

    names: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{', '.join(self.names)}: {self.text}"


def load_engine_args(path: str | Path) -> dict[str, Any]:
    """The engine arguments of a YAML file, ready for ``vllm.LLM(**args)``.

    Raises:
        ConfigError: the file can't be read, or the installed vLLM would not take what it says: every problem at once,
            each with what was seen, expected, and what to do. Also where no vLLM is installed to check against.
    """
    config = read_engine_config(path)
    return checked(config.engine, config.where)


def rl_engine_args(preset: str = "rl", **overrides: Any) -> dict[str, Any]:
    """The engine arguments of a preset with ``overrides`` laid over them, ready for ``vllm.LLM(**args)``.

    Args:
        preset: ``rl``, ``throughput``, ``long_context`` or ``mixed_cluster`` (``configs/vllm_*.yaml``).
        **overrides: vLLM's engine arguments. A mapping is laid over a mapping key by key; None takes an argument out,
            so that vLLM's own default holds.

    Raises:
        ConfigError: an unknown preset, and as ``load_engine_args``.
    """
    config = read_engine_config(_known(preset, "rl_engine_args"))
    return checked(laid_over(config.engine, overrides), f"rl_engine_args({preset!r}, ...)")


def read_engine_config(source: str | Path | Mapping[str, Any]) -> EngineConfig:
    """Read a preset (by name), a YAML file (by path) or a mapping of the same form. Raises ConfigError."""
    if isinstance(source, Mapping):
        return _config("engine_args", dict(source), {})
    where = str(source)
    if where in PRESETS:
        text = importlib.resources.files(__package__).joinpath("presets", PRESETS[where]).read_text("utf-8")
    else:
        expected = f"a YAML file of vLLM's engine arguments, or a preset: {', '.join(PRESETS)}"
        text = read_text(source, expected, nearest(where, PRESETS))
    values = from_yaml(text, where)
    return _config(where, {} if values is None else values, _reasons(text))


def _config(where: str, values: Any, reasons: dict[str, str]) -> EngineConfig:
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"{where} holds a {type(values).__name__}. Expected a mapping such as 'dtype: bfloat16'.")
    base = EngineConfig(where, {})
    if (preset := values.pop("preset", None)) is not None:
        base = read_engine_config(_known(preset, where))
    trainer = values.pop("trainer", None)
    if trainer is not None and not isinstance(trainer, dict):
        raise ConfigError(
            f"{where}: trainer is {trainer!r}. Expected a mapping of TRL's settings such as "
            "'cast_lm_head_to_fp32: true'."
        )
    both = base.trainer if trainer is None else laid_over(base.trainer or {}, trainer)
    return EngineConfig(where, laid_over(base.engine, values), both, base.reasons | reasons)


def _known(preset: Any, where: str) -> str:
    if preset not in PRESETS:
        hint = nearest(str(preset), PRESETS)
        raise ConfigError(f"{where}: preset is {preset!r}{hint}. Expected one of: {', '.join(PRESETS)}.")
    return str(preset)


def _reasons(text: str) -> dict[str, str]:
    """argument -> the comment in its paragraph, as one line."""
    found: dict[str, str] = {}
    for part in text.split("\n\n"):
        lines = part.splitlines()
        comment = " ".join(line.lstrip("# ").rstrip() for line in lines if line.startswith("#"))
        keys = [key[1] for line in lines if (key := re.match(r"(\w+):", line))]
        found |= {key: comment for key in keys if comment}
    return found


def laid_over(args: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``overrides`` over ``args``: mappings key by key, None takes an argument out."""
    out = dict(args)
    for name, value in overrides.items():
        if value is None:
            out.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(out.get(name), Mapping):
            out[name] = laid_over(out[name], value)
        else:
            out[name] = value
    return out


def checked(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments themselves. Raises ConfigError with every problem at once."""
    found = list(problems(args))
    if found:
        listed = "".join(f"\n  - {problem}" for problem in found)
        from .argument_schema import installed

        raise ConfigError(f"{where}: vLLM {installed()} would not run with these as they are meant:{listed}")
    return dict(args)


def problems(args: Mapping[str, Any]) -> Iterator[Problem]:
    """Everything the installed vLLM would not take as it is meant. Raises ConfigError where none is installed."""
    from .argument_schema import arguments, installed, refusal, wrong_value

    if installed() is None:
        raise ConfigError(
            "engine arguments are checked against the installed vLLM, and none is installed. Run this where the "
            "engine runs: pip install 'trl-parity[vllm]'."
        )
    known = arguments()
    wrong: set[str] = set()
    for name, value in args.items():
        if name not in known:
            wrong.add(name)
            yield Problem((name,), _unknown(name))
        elif expected := wrong_value(known[name], value):
            wrong.add(name)
            yield Problem((name,), f"is {value!r}. {expected}")
    right = {name: value for name, value in args.items() if name not in wrong}
    for names, text in conflicts(right):
        yield Problem(names, text)
    if wrong:
        return
    if said := refusal(args):
        yield Problem(tuple(args), f"vLLM refuses them together: {said}")


def _unknown(name: str) -> str:
    from .argument_schema import arguments, environment, sampling_names, serve_names

    if (gone := RETIRED.get(name.replace("-", "_"))) is not None:
        return f"{gone}."
    if name in environment():
        return "an environment variable of vLLM, not an argument: set it before the process starts."
    if name in sampling_names():
        return "a setting of each request (SamplingParams), not of the engine: the trainer's arguments set it."
    if name in serve_names():
        return "an argument of `vllm serve`, not of the engine: add it to the server's command line."
    plain = name.replace("-", "_").removeprefix("vllm_")
    hint = f" (did you mean {plain!r}?)" if plain in arguments() else nearest(plain, arguments())
    return f"no engine argument of this vLLM{hint}."


def serve_line(args: Mapping[str, Any], model: str) -> str:
    """The ``vllm serve`` command with these arguments, quoted for a shell; mappings are JSON.

    It listens on this machine alone (``--host 127.0.0.1``): vLLM's own default is every address the machine has.

    Raises ConfigError for what no command line holds, such as a callable.
    """
    words = ["vllm", "serve", model]
    for name, value in args.items():
        if name == "model":
            continue
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list | tuple | set):
            words += [flag, *(str(item) for item in value)]
        else:
            words += [flag, _word(name, value)]
    return shlex.join([*words, "--host", "127.0.0.1"])


def _word(name: str, value: Any) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    try:
        return json.dumps(value)
    except TypeError as e:
        raise ConfigError(
            f"{name} is {value!r}, which no command line holds. Expected a number, a text or a mapping of such."
        ) from e
