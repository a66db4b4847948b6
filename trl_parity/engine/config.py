"""Engine arguments for vLLM, checked against the vLLM that is installed before an engine is built.

A file of them is YAML: vLLM's own names, one a line, and optionally a block ``trainer:`` with the settings of TRL's
config that belong to them (an fp32 head is one only on both sides). Such a block says that the file is meant for RL.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..rules import nearest
from .retired import RETIRED

__all__ = [
    "PRESETS",
    "EngineConfig",
    "Problem",
    "load_engine_args",
    "problems",
    "read_engine_config",
    "rl_engine_args",
]

PRESETS = {
    "rl": "vllm_rl.yaml",
    "throughput": "vllm_throughput.yaml",
    "long_context": "vllm_long_context.yaml",
    "mixed_cluster": "vllm_mixed_cluster.yaml",
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One file of engine arguments, read and not yet checked."""

    where: str
    engine: dict[str, Any]  # arguments of vllm.LLM
    trainer: dict[str, Any] | None = None  # settings of TRL's config that belong to them; None: not meant for RL


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
        ConfigError: an unknown preset, and as :func:`load_engine_args`.
    """
    if preset not in PRESETS:
        raise ConfigError(
            f"preset is {preset!r}{nearest(str(preset), PRESETS)}. Expected one of: {', '.join(PRESETS)}."
        )
    config = read_engine_config(preset)
    return checked(laid_over(config.engine, overrides), f"rl_engine_args({preset!r}, ...)")


def read_engine_config(source: str | Path | Mapping[str, Any]) -> EngineConfig:
    """Read a preset (by name), a YAML file (by path) or a mapping of the same form. Raises ConfigError."""
    import yaml

    if isinstance(source, Mapping):
        values, where = dict(source), "engine arguments"
    else:
        where = str(source)
        try:
            if where in PRESETS:
                text = importlib.resources.files("trl_parity").joinpath("presets", PRESETS[where]).read_text("utf-8")
            else:
                text = Path(source).read_text(encoding="utf-8")
            values = yaml.safe_load(text)
        except OSError as e:
            raise ConfigError(
                f"cannot read {where}: {e.strerror}{nearest(where, PRESETS)}. Expected a YAML file of vLLM's engine "
                f"arguments, or a preset: {', '.join(PRESETS)}."
            ) from e
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise ConfigError(f"{where} is not valid YAML: {e}") from e
        values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"{where} holds a {type(values).__name__}. Expected a mapping such as 'dtype: bfloat16'.")
    trainer = values.pop("trainer", None)
    if trainer is not None and not isinstance(trainer, dict):
        raise ConfigError(
            f"{where}: trainer is {trainer!r}. Expected a mapping of TRL's settings such as "
            "'cast_lm_head_to_fp32: true'."
        )
    return EngineConfig(where, values, trainer)


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
        from .schema import installed

        raise ConfigError(f"{where}: vLLM {installed()} would not run with these as they are meant:{listed}")
    return dict(args)


def problems(args: Mapping[str, Any]) -> Iterator[Problem]:
    """Everything the installed vLLM would not take as it is meant. Raises ConfigError where none is installed."""
    from .schema import arguments, installed, wrong_value

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
    if wrong:
        return
    from vllm.engine.arg_utils import EngineArgs

    known_to_engine = EngineArgs.__dataclass_fields__
    try:
        EngineArgs(**{name: value for name, value in args.items() if name in known_to_engine})
    except Exception as e:  # whatever its __post_init__ refuses
        yield Problem(tuple(args), f"vLLM refuses them together: {type(e).__name__}: {e}")


def _unknown(name: str) -> str:
    from .schema import arguments, environment, sampling_names, serve_names

    if (gone := RETIRED.get(name)) is not None:
        return f"gone since vLLM {gone.since}. {gone.instead} (https://github.com/vllm-project/vllm/pull/{gone.pull})"
    if name in environment():
        return "an environment variable of vLLM, not an argument: set it before the process starts."
    if name in sampling_names():
        return "a setting of each request (SamplingParams), not of the engine: the trainer's arguments set it."
    if name in serve_names():
        return "an argument of `vllm serve`, not of the engine: add it to the server's command line."
    plain = name.replace("-", "_").removeprefix("vllm_")
    hint = f" (did you mean {plain!r}?)" if plain in arguments() else nearest(plain, arguments())
    return f"no engine argument of this vLLM{hint}."
