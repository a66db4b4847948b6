"""TRL's colocated engine, built with arguments of our own. Written against TRL 1.16.

TRL passes vLLM thirteen arguments and takes no others. Names used of ``trl.generation.vllm_generation``: ``LLM``
(builds the engine) and ``VLLMGeneration._init_vllm`` (calls it).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ..credentials import without_credentials
from ..engine.base import Engine
from ..engine.config import checked, read_engine_config, serve_line
from ..engine.requested_vs_live import differences
from ..errors import ConfigError, InterceptionError

__all__ = ["TRLEngineArguments", "laid_under"]

logger = logging.getLogger(__name__)

# what TRL's own code relies on: which setting of its config says it
_TRL_DECIDES = {
    "model": "model",
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "enable_sleep_mode": "vllm_enable_sleep_mode",
    "distributed_executor_backend": None,
    "quantization": None,
}

_IN_TRL = {
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "max_model_len": "vllm_max_model_length",
    "model_impl": "vllm_model_impl",
    "trust_remote_code": "trust_remote_code",
}


class TRLEngineArguments:
    """Inside the block, engines that TRL builds get ``args`` laid over what TRL passes.

        with TRLEngineArguments("rl"):
            trainer = GRPOTrainer(...)

    ``ParityCallback(engine_args="rl")`` does this for its own trainer, and compares the engine that came of it.

    ``args``: the arguments, checked. ``trainer``: the settings of TRL's config that belong to them. ``built``:
    everything the last engine was built with, None before.

    Args:
        source: A preset's name, the path of a YAML file, or a mapping of the same form (``preset`` in it is a name).

    Raises:
        ConfigError: the source can't be read or the installed vLLM would not take it; while a trainer is built, an
            argument that TRL's own code decides, or two that together make no engine.
        InterceptionError: a TRL that builds its engine otherwise.
    """

    def __init__(self, source: str | Path | Mapping[str, Any]):
        config = read_engine_config(source)
        self.args = checked(config.engine, config.where)
        self.trainer = dict(config.trainer or {})
        self.built: dict[str, Any] | None = None
        self._original: Any = None

    def __enter__(self) -> TRLEngineArguments:
        module = _module()
        if self._original is None:
            self._original, module.LLM = module.LLM, self._build
        return self

    def __exit__(self, *_: object) -> None:
        if self._original is not None:
            _module().LLM, self._original = self._original, None

    def _build(self, **theirs: Any) -> Any:
        merged, changed = laid_under(self.args, theirs)
        checked({n: v for n, v in merged.items() if v is not None}, "engine_args over what TRL passes")
        for text in changed:
            logger.warning("engine_args: %s", text)
        build, self.built = self._original, merged
        return build(**merged)

    def apply_to(self, model: Any) -> None:
        """The next engine that TRL builds for this model (the trainer's) gets them, and no other engine."""
        _instrument()
        self.built, _requests[model] = None, self

    def unlike(self, trainer_args: Any) -> list[str]:
        """Settings of TRL's config that are not what belongs to these arguments, in words."""
        return [
            f"{name} is {getattr(trainer_args, name)!r}, and belongs with {value!r} to these engine arguments"
            for name, value in self.trainer.items()
            if hasattr(trainer_args, name) and getattr(trainer_args, name) != value
        ]

    def disagreement(self, generation: Any, engine: Engine | None) -> str:
        """What the live engine behind TRL's ``VLLMGeneration`` does not run with as asked; empty where all is."""
        if generation is None:
            return ""
        colocated = generation.mode == "colocate"
        if colocated and self.built is None:
            return (
                "the engine was built without engine_args. Create ParityCallback before the trainer and pass it in "
                "callbacks=[...]; trainer.add_callback() is too late."
            )
        if engine is None:  # another rank talks to the server, or it does not tell: said by who asked
            return ""
        asked = {name: (self.built or self.args)[name] for name in self.args}
        found = [f"{name}: asked {want!r}, runs with {is_!r}" for name, want, is_ in differences(asked, engine)]
        if not found:
            return ""
        model = str(engine.setting("model_config", "model"))
        mend = (
            "vLLM changed it on the way (its log says why), or something else built the engine: ask for what it runs "
            "with, or take the argument out."
            if colocated
            else f"Start the server with: {serve_line(without_credentials(self.args), model)}"
        )
        return f"the engine does not run with engine_args as asked. {'; '.join(found)}. {mend}"


_requests: WeakKeyDictionary[Any, TRLEngineArguments] = WeakKeyDictionary()  # by the trainer's model

_MARK = "_trl_parity_engine_args"


def _module() -> Any:
    import trl
    from trl.generation import vllm_generation

    if not hasattr(vllm_generation, "LLM") or not hasattr(vllm_generation.VLLMGeneration, "_init_vllm"):
        raise InterceptionError(
            f"trl {trl.__version__} builds its vLLM engine otherwise than VLLMGeneration._init_vllm of a tested TRL "
            "does (or vLLM is not installed), so engine_args can't reach it. Install vLLM, or pin a tested TRL."
        )
    return vllm_generation


def _instrument() -> None:
    """Let TRL's engines be built with what was asked for their model. Idempotent; others pay one look-up."""
    cls = _module().VLLMGeneration
    original = cls._init_vllm
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def init_vllm(self: Any) -> None:
        request = _requests.pop(self.model, None) if self.mode == "colocate" else None
        with request or nullcontext():
            original(self)

    setattr(init_vllm, _MARK, True)
    cls._init_vllm = init_vllm


def laid_under(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """TRL's arguments under ours, and in words each of TRL's that ours replaced. Pure.

    ``seed`` is added to TRL's, which is the rank's number: data-parallel engines with one seed would draw alike.
    Raises ConfigError, with all of them, for arguments that TRL's own code relies on.
    """
    refused = [
        f"{name}={ours[name]!r} where TRL passes {theirs[name]!r}"
        + (f" ({setting} in the trainer's arguments)" if setting else "")
        for name, setting in _TRL_DECIDES.items()
        if name in ours and name in theirs and ours[name] != theirs[name]
    ]
    if refused:
        raise ConfigError(
            f"engine_args sets what TRL's own code relies on: {'; '.join(refused)}. Take it out of engine_args, and "
            "set it where TRL reads it."
        )
    merged, changed = {**theirs, **ours}, []
    if "seed" in ours and isinstance(theirs.get("seed"), int):
        merged["seed"] = ours["seed"] + theirs["seed"]
    if ours.get("kv_cache_memory_bytes") is not None and "gpu_memory_utilization" not in ours:
        share = merged.pop("gpu_memory_utilization", None)
        changed.append(f"kv_cache_memory_bytes replaces TRL's gpu_memory_utilization={share}")
    for name in ours:
        if name == "seed" or theirs.get(name) is None or theirs[name] == ours[name]:
            continue
        where = f" ({_IN_TRL[name]})" if name in _IN_TRL else ""
        changed.append(f"{name}={ours[name]!r} replaces TRL's {theirs[name]!r}{where}")
    return merged, changed
