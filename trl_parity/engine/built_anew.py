"""What a colocated engine holds against what the same module holds that is built anew from its config and weights.

Parameters alone do not make an engine's function: rotary tables, cache scales, packed or swapped copies, scales and
caps in plain attributes are derived at load, and no sync touches them. A module of the same class, built from the live
engine's config, given the policy's weights by the class's own ``load_weights`` and finished as after a load, holds
them as they should be. Nothing of the live engine is written but inside ``as_built_anew``, which puts all of it back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..scoring.perturb import own_random_numbers
from .base import InProcessEngine

__all__ = ["Part", "as_built_anew", "built_anew", "parted"]

# contents of the cache itself; what a module is called, where it runs, how often it ran and how it was compiled
_NOT_STATE = {
    "kv_cache", "prefix", "layer_name", "training", "gradient_checkpointing", "compiled", "do_not_compile", "device",
}  # fmt: skip

_MARGIN = 1.25  # of the engine's bytes that must be free: modules are finished one by one after loading


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One thing the two modules hold and not alike: a tensor, or a plain setting (a number, a window, a name)."""

    name: str
    owner: Any  # in the live engine
    attribute: str
    live: Any
    anew: Any

    @property
    def fits(self) -> bool:
        """Whether the new one can be put in its place."""
        if not isinstance(self.live, torch.Tensor):
            return not isinstance(self.anew, torch.Tensor)
        return isinstance(self.anew, torch.Tensor) and self.live.shape == self.anew.shape


def built_anew(
    engine: InProcessEngine, weights: Iterable[tuple[str, torch.Tensor]]
) -> tuple[torch.nn.Module, frozenset[str]]:
    """The engine's module, built anew from its config on these weights; and its parameters that none of them reached.

    Raises MemoryError without room for it, and what vLLM does.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    live = engine.model
    needed, free = _MARGIN * _bytes(live), _free_bytes(next(live.parameters()).device)
    if needed > free:
        raise MemoryError(
            f"an engine built anew wants {needed / 2**30:.1f} GiB beside the live one; {free / 2**30:.1f} GiB are free"
        )
    config = copy.copy(engine.llm.llm_engine.vllm_config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.static_forward_context = {}  # the live engine's layers are registered in its own
    device = next(live.parameters()).device
    shared, rotary_embedding._ROPE_DICT = rotary_embedding._ROPE_DICT, {}  # tables are shared by what asks alike
    try:
        with (
            own_random_numbers(), set_current_vllm_config(config),
            set_default_torch_dtype(config.model_config.dtype), torch.no_grad(),
        ):  # fmt: skip
            with device:
                module = initialize_model(vllm_config=config)
            with _Writes() as seen:  # what load_weights returns are names of its own for some models
                module.load_weights((name, tensor.detach()) for name, tensor in weights)
            unreached = {n for n, p in module.named_parameters() if _storage(p) not in seen.written}
            process_weights_after_loading(module, config.model_config, device)
    finally:
        rotary_embedding._ROPE_DICT = shared
    return module, frozenset(unreached)


def parted(live: torch.nn.Module, anew: torch.nn.Module, unreached: frozenset[str] = frozenset()) -> list[Part]:
    """What the live module holds and not as the new one does, in the live one's order.

    Tensors (parameters, buffers and plain attributes) are equal where all elements are, numbers to 1e-9. What only one
    of the two has is left out, and so is what no weight reached, whatever it is called.
    """
    theirs = {name: value for name, _, _, value in _state(anew)}
    found: list[Part] = []
    seen: set[tuple[int, torch.Size]] = set()
    held = {_storage(p) for name, p in live.named_parameters() if name in unreached}
    for name, owner, attribute, value in _state(live):
        if (
            held and isinstance(value, torch.Tensor) and _storage(value) in held
        ):  # under another name: a router keeps its bias
            continue
        if name not in theirs or _alike(value, theirs[name]):
            continue
        if isinstance(value, torch.Tensor):
            if (value.data_ptr(), value.shape) in seen:  # tied
                continue
            seen.add((value.data_ptr(), value.shape))
        found.append(Part(name, owner, attribute, value, theirs[name]))
    return found


@contextmanager
def as_built_anew(parts: Sequence[Part]) -> Iterator[None]:
    """Inside: the live engine holds what the new one does, in its own storages. All as it was after it."""
    kept: list[tuple[Part, Any]] = []
    try:
        with torch.no_grad():
            for part in parts:
                if not part.fits:
                    continue
                if isinstance(part.live, torch.Tensor):
                    kept.append((part, part.live.detach().clone()))
                    part.live.copy_(part.anew)
                else:
                    kept.append((part, part.live))
                    setattr(part.owner, part.attribute, part.anew)
        yield
    finally:
        with torch.no_grad():
            for part, value in reversed(kept):
                if isinstance(part.live, torch.Tensor):
                    part.live.copy_(value)
                else:
                    setattr(part.owner, part.attribute, value)


def _state(module: torch.nn.Module) -> Iterator[tuple[str, Any, str, Any]]:
    """Name, owner, attribute and value of all that a module computes with: its own, and that of what it keeps."""
    for path, part in module.named_modules():
        own = {**part._parameters, **part._buffers, **_plain(part)}
        yield from _named(path, part, own)
        for name, kept in vars(part).items():  # attention's implementation, a quantization's method
            if type(kept).__module__.startswith("vllm.") and hasattr(kept, "__dict__") and _computes(kept):
                yield from _named(f"{path}.{name}", kept, _plain(kept))


def _computes(kept: Any) -> bool:
    """Neither a function, nor a cache with its counters, nor a config: both modules are built from one."""
    return not callable(kept) and not isinstance(kept, Mapping) and not type(kept).__module__.startswith("vllm.config")


def _plain(owner: Any) -> Mapping[str, Any]:
    return {
        name: value for name, value in vars(owner).items() if isinstance(value, torch.Tensor) or _is_setting(value)
    }


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_setting(x) for x in value)
    return value is None or isinstance(value, bool | int | float | str)


def _named(path: str, owner: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    for name, value in values.items():
        if name not in _NOT_STATE and not (isinstance(value, torch.Tensor) and not value.numel()):
            yield f"{path}.{name}".lstrip("."), owner, name, value


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) or a is None or b is None:
        return a is b
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return bool(a == b) or (numbers and math.isclose(a, b, rel_tol=1e-9)) or (a != a and b != b)


class _Writes(TorchDispatchMode):
    """Inside: notes which storages are written to."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and func._schema.arguments[0].is_write and isinstance(args[0], torch.Tensor):
            self.written.add(_storage(args[0]))
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)
