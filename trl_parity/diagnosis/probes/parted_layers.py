"""Layer by layer: where in two models on the same weights the outputs for one sequence part."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ...engine.base import InProcessEngine
from ...engine.uncompiled import uncompiled
from ...scoring.model_head import causal_lm
from ..counterfactual import DiagnosedBatch
from .asking import Whole

__all__ = ["first_parted", "where_parted"]

_PLACES = 32  # tokens of the sequence

_APART = 4.0  # units in the last place of the coarser side's activations: less is rounding

_LEAST = 1e-4  # so few of them in fp32 are not worth a word

_JUMP = 5.0  # times the largest gap before it: what only grows from layer to layer begins nowhere

# a layer, or a part of one: "layers.3", "h.0.attn"; what stands before differs where a model is wrapped
_LAYER = re.compile(r"(?:^|\.)([a-z_]+\.\d+(?:\.[a-z_]+)?)$")


def where_parted(batch: DiagnosedBatch, engine: InProcessEngine, whole: Whole) -> str:
    """In words, "; layer by layer they part at ...". Nothing where no layer can be singled out.

    Nor where the two sides name theirs differently.
    """
    ours, theirs = _layers(causal_lm(batch.model)), _layers(engine.model)
    common = [name for name in ours if name in theirs]
    places = torch.linspace(0, len(whole.ids) - 2, min(_PLACES, len(whole.ids) - 1)).long().unique()
    with uncompiled(engine.model), _recorded({name: theirs[name] for name in common}, places) as held:
        engine.rescore([whole.ids])
    if not held:
        return ""
    with _recorded({name: ours[name] for name in common}, places) as own:
        batch.passes.own_logits(torch.tensor(whole.ids), places[-1:] + 1, whole.at, whole.start)
    gaps = {name: _gap(held[name], own[name]) for name in own if name in held and held[name].shape == own[name].shape}
    coarser = max(torch.finfo(dtype).eps for dtype in (engine.dtype, batch.capture.compute_dtype))
    return first_parted(gaps, max(_APART * coarser, _LEAST))


def first_parted(gaps: Mapping[str, float], limit: float) -> str:
    """The first output over ``limit`` that is not just a little further off than those before it.

    ``gaps``: ‖theirs - ours‖ / ‖ours‖ of outputs, in the order they are made.
    """
    before = 0.0
    for name, gap in gaps.items():
        if gap > limit and gap > _JUMP * before:
            others = f"; what is made before it, by {before:.2g} of its size at most" if before else ""
            return f"; layer by layer they part at {name}, whose output differs by {gap:.2g} of its size{others}"
        before = max(before, gap)
    return ""


def _layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Layers and their parts by the end of their names, where one has it alone."""
    found: dict[str, list[torch.nn.Module]] = {}
    for name, module in model.named_modules():
        if match := _LAYER.search(name):
            found.setdefault(match[1], []).append(module)
    return {name: modules[0] for name, modules in found.items() if len(modules) == 1}


@contextmanager
def _recorded(modules: Mapping[str, torch.nn.Module], places: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Inside: the first output of each, at these tokens of a sequence, (n, H) fp32; in the order they are made."""
    outputs: dict[str, torch.Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            made = _made(output, whole=name.rpartition(".")[2].isdigit())
            if name not in outputs and made is not None and len(made) > int(places[-1]):  # not a chunk, nor a token
                outputs[name] = made[places.to(made.device)].detach().float().cpu()  # a copy: some are reused in place

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _made(output: Any, whole: bool) -> torch.Tensor | None:
    """(T, H) of what a module puts out; a whole layer of vLLM's puts out what is still to be added, and to what."""
    parts = output if isinstance(output, tuple) else (output,)
    first = parts[0]
    if not isinstance(first, torch.Tensor) or first.ndim not in (2, 3):
        return None
    second = parts[1] if len(parts) > 1 else None
    if whole and first.ndim == 2 and isinstance(second, torch.Tensor) and second.shape == first.shape:
        first = first + second
    return first[0] if first.ndim == 3 else first


def _gap(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    return float((theirs - ours).norm() / ours.norm().clamp(min=1e-30))
