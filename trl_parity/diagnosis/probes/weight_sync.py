"""Probes of the engine's weights against the trainer's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...engine.base import in_process
from ...engine.weight_readback import HeldTensor, PolicyTensor, policy_tensors, read_back
from ...scoring.dtypes import dtype_name
from ..counterfactual import Counterfactual, DiagnosedBatch
from ..findings import EngineWeights, Findings
from ..quantized import quantized_as
from ..weight_versions import WeightVersions
from .base import Candidate, NotPossible, Probe, independent, probe, require_engine, with_forward

__all__ = ["WEIGHT_SYNC"]

_FP8 = 256  # values at most that an 8-bit number has

_ARRIVED = 20  # elements that would differ, had a tensor not arrived, from which on "none does" means it did

_NEAR = 0.25  # mean |difference| to mean |value|, of a tensor that was rounded

_MORE_THAN_ONCE, _IN_PART = 1.2, (0.1, 0.9)  # times that adapters count

_ALIKE = 0.1  # of the adapters, left by a part of them: older ones have another direction, too, as a rule

_AS_A_RULE = 0.5  # confidence then: after batches without a gradient Adam goes on in the direction it had

_SAMPLE = 65_536  # elements of a tensor that its rounding step is looked up for


def engine_weights(
    batch: DiagnosedBatch, current: Counterfactual, findings: Findings
) -> tuple[Candidate | None, Findings]:
    """The trainer scores with the weights the engine holds, read tensor by tensor."""
    require_engine(batch)
    if not in_process(batch.engine):
        raise NotPossible("a server does not hand out its weights")
    held = findings.engine_weights
    if held is None or batch.sharded:  # reading shards is a collective: all ranks do it or none
        optimizer = getattr(batch.capture.trainer, "optimizer", None)
        held = _read(batch.model, batch.engine.model, batch.engine.dtype, optimizer, batch.versions)
    found = Findings(engine_weights=held)
    if not held.differing:
        return None, found
    words = _words(held, dtype_name(batch.engine.dtype))
    if batch.sharded or not held.readable:
        raise NotPossible(f"{words}; the policy's weights can't be swapped here to see what that does", found)
    candidate = Candidate(
        counterfactual=with_forward(current, weights=held),
        cause=_cause(held),
        finding=words,
        fix=_fix(held),
        most=_AS_A_RULE if _unsure(held) else 1.0,
        details={
            "tensors": {name: dict(sizes) for name, sizes in held.differing.items()},
            "ignored": list(held.ignored),
            "arrived": held.arrived,
            "rounded": dict(held.rounded),
            "exchanged": dict(held.exchanged),
            "older": held.older,
        },
    )
    return candidate, found


_ONE_DTYPE = "hold these in one dtype on both sides: {}; they are the trainer's, rounded."

_ON_THE_WAY = (
    "find what changes these tensors on their way to the engine, or in it (a scale, a quantizer, an average, another "
    "layer's name): {}."
)


def _cause(held: EngineWeights) -> str:
    """Rounding first: tensors that are the trainer's, rounded, did arrive."""
    if held.coarse:
        return "kv_cache_precision"
    if held.differing.keys() == held.rounded.keys():
        return "dtype_gap"
    return "partial_sync" if held.partial or held.altered else "stale_weights"


def _unsure(held: EngineWeights) -> bool:
    """Whether older weights and changed ones can look alike: adapters of which no versions are known."""
    if held.coarse:
        return False
    if held.adapter_counts is not None:
        return held.adapter_counts < 1.0 and held.older is None
    return held.adapted and held.older is None


def _fix(held: EngineWeights) -> str:
    if held.rounded and not held.coarse:
        return _ONE_DTYPE.format(_some(held.missing))
    return _ON_THE_WAY.format(_some(held.missing)) if held.altered and not held.coarse else ""


def _read(
    policy: torch.nn.Module,
    model: Any,
    dtype: torch.dtype,
    optimizer: Any = None,
    versions: WeightVersions | None = None,
) -> EngineWeights:
    """What the engine's module holds of each of the policy's tensors. ``optimizer``: tells which have moved.

    ``versions``: of the policy's, since the run began.
    """
    named = list(policy_tensors(policy))
    held = read_back(model.load_weights, model, ((t.name, t.tensor) for t in named))
    deaf = {h.name for h in held if not h.written}  # to the loader as it is now; the class's own may know them
    known = read_back(
        functools.partial(type(model).load_weights, model),
        model,
        ((t.name, t.tensor) for t in named if t.name in deaf),
    )
    held = [h for h in held if h.written] + known
    ours = {t.name: t for t in named}
    trained = [h for h in held if ours[h.name].trained]
    differing = [h for h in held if h.differing]
    updated = _updated(optimizer)
    # a tensor that no part of the loss depends on (a vision tower's last layers) the engine may well do without
    ignored = tuple(h.name for h in trained if h.name in deaf and updated(ours[h.name].parameter))
    wide = [h for h in differing if h.numel >= 1024] or differing
    moved = [(h, ours[h.name].tensor, updated(ours[h.name].parameter)) for h in trained]
    arrived = _arrived(moved, [(h, ours[h.name].tensor) for h in wide], dtype)
    rounded = {h.name: name for h in differing if (name := _rounded_to(h.values, ours[h.name].tensor))}
    values = {h.name: h.values for h in differing if h.values is not None}
    adapted = any(t.adapted for t in named)
    known_versions = versions if versions is not None and versions.whole else None
    older = known_versions.holds_older(values, dtype) if known_versions is not None else None
    moves = known_versions.moved_since(values, dtype) if known_versions is not None and adapted else None
    if moves is not None:  # adapters move each tensor by another amount
        arrived = sum(h.written > 0 and not h.differing and h.name in moves for h in trained)
    forms = [_form(h.values, ours[h.name].tensor, dtype) for h in wide]
    return EngineWeights(
        total=len(held),
        differing={h.name: {"differing": h.differing / max(1, h.written), "gap": h.gap} for h in differing},
        ignored=ignored,
        arrived=arrived,
        missing=(*ignored, *(h.name for h in differing if h.name not in deaf)),
        partial=arrived > 0 or 0 < len(ignored) < len(trained),
        rounded=rounded,
        exchanged=_exchanged(differing, ours),
        coarse=bool(forms) and all(forms),
        form=", ".join(sorted(set(forms))),
        older=older,
        adapter_counts=None if (older or 0.0) >= 0.5 else _adapter_counts(values, ours, dtype),
        values=_swaps(ours, differing) if differing else {},
        readable=all(h.values is not None for h in differing),
        adapted=adapted,
    )


def _updated(optimizer: Any) -> Callable[[torch.nn.Parameter], float]:
    """Of a parameter, the share of its elements that updates have moved, by what the optimizer keeps of gradients.

    A tensor without a gradient (experts nobody takes, a head behind a loss of zero) is alike on both sides, arrived or
    not. 1 where nothing is known: an optimizer that keeps nothing, or one of other tensors.
    """
    groups = [] if optimizer is None else optimizer.param_groups
    known = {id(parameter) for group in groups for parameter in group["params"]}
    state = {} if optimizer is None else optimizer.state

    def share(parameter: torch.nn.Parameter) -> float:
        if id(parameter) not in known or not state:
            return 1.0
        if not (kept := state.get(parameter)):
            return 0.0
        shares = [
            float((x != 0).float().mean())
            for x in kept.values()
            if isinstance(x, torch.Tensor) and x.shape == parameter.shape
        ]
        return max(shares, default=1.0)

    return share


def _arrived(
    trained: Sequence[tuple[HeldTensor, torch.Tensor, float]],
    differing: Sequence[tuple[HeldTensor, torch.Tensor]],
    dtype: torch.dtype,
) -> int:
    """How many trained tensors are alike, of those that would hardly be if they were as old as the differing ones.

    ``trained``: each with the share of its elements that updates have moved.
    An update of size u shows in an element with the probability u / step, 1 at most, step being the distance to the
    next number in the engine's dtype: .008 beside a norm's 1.0 in bf16, .0001 beside a matrix' .02. u is what makes
    the differing tensors differ in as many elements as they do; where all do, what they differ by, less the rounding.
    """
    if not differing:
        return 0
    steps = [(h.differing / max(1, h.written), _steps(tensor, dtype)) for h, tensor in differing]
    low, high = 0.0, max(float(step.max()) for _, step in steps)
    for _ in range(40):
        update = 0.5 * (low + high)
        shown = sum(float((update / step).clamp(max=1.0).mean()) for _, step in steps)
        low, high = (update, high) if shown < sum(share for share, _ in steps) else (low, update)
    update = max(low, sum(h.gap - 0.5 * float(step.mean()) for (h, _), (_, step) in zip(differing, steps, strict=True))
                 / len(steps))  # fmt: skip
    return sum(
        h.written > 0
        and not h.differing
        and 0.25 * share * h.numel * float((update / _steps(tensor, dtype)).clamp(max=1.0).mean()) >= _ARRIVED
        for h, tensor, share in trained
    )


def _steps(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance of numbers of ``dtype`` at some of a tensor's elements."""
    some = tensor.detach().flatten()
    some = some[:: max(1, len(some) // _SAMPLE)].float().cpu()
    _, exponent = torch.frexp(some)
    return torch.finfo(dtype).eps * torch.exp2(exponent.float() - 1.0)


def _words(held: EngineWeights, dtype: str) -> str:
    words = f"{len(held.differing)} of {held.total} tensors are not the trainer's in the engine's {dtype}"
    if held.coarse:
        words += f" but quantized: {held.form}"
    elif held.adapter_counts is not None:
        words += f" but the base and {held.adapter_counts:.3g} times the adapter"
        words += " (or an older one that had its direction)" if held.adapter_counts < 1.0 else ""
    elif held.older is not None:
        of_them = (
            "an older version of the trainer's" if held.older else "no version the trainer's have had in this run"
        )
        words += f", {held.older or 1.0:.0%} of those looked at {of_them}"
    if held.arrived:
        words += f", {held.arrived} arrived"
    if held.ignored:
        words += f", {len(held.ignored)} are ignored by its load_weights"
    if held.rounded and not held.coarse:
        words += f", {len(held.rounded)} of them rounded to {', '.join(sorted(set(held.rounded.values())))}"
    if held.partial or held.rounded:
        words += f": {_some(held.missing)}"
    if held.exchanged:
        words += f"; {_some([f'{name} holds {other}' for name, other in held.exchanged.items()])}"
    return words


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")


def _rounded_to(held: torch.Tensor | None, ours: torch.Tensor) -> str:
    """The narrower dtype in which the trainer's tensor is what the engine holds; "" where there is none."""
    if held is None:
        return ""
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        if _bits(dtype) < _bits(ours.dtype) and torch.equal(ours.to(dtype).to(held.dtype), held):
            return dtype_name(dtype)
    return ""


def _exchanged(differing: Sequence[HeldTensor], ours: Mapping[str, PolicyTensor]) -> dict[str, str]:
    """Which of the differing tensors hold what belongs to another of the same shape."""
    found: dict[str, str] = {}
    samples = {name: _sample(t.tensor) for name, t in ours.items()} if differing else {}
    for h in differing:
        if h.values is None or h.numel < _ARRIVED:
            continue
        mine = _sample(h.values)
        for name, other in ours.items():
            same = name != h.name and other.tensor.shape == h.values.shape and _apart(samples[name], mine) < 0.01
            # far nearer than to its own, too: norms are all alike
            if same and _apart(other.tensor, h.values) < min(0.01, 0.1 * _apart(ours[h.name].tensor, h.values)):
                found[h.name] = name
                break
    return found


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().flatten()[:: max(1, tensor.numel() // 256)]


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean |a - b| over mean |a|."""
    return float((a.to(b.dtype) - b).abs().mean()) / max(float(a.abs().mean()), 1e-30)


def _form(held: torch.Tensor | None, ours: torch.Tensor, dtype: torch.dtype) -> str:
    """What a quantizer made of the trainer's, in words: a grid, or no more values than 8 bits hold; "" for neither."""
    if held is None:
        return ""
    if found := quantized_as(held, ours, dtype):
        return found
    some, all_ = (x.flatten()[: 16 * _FP8].unique().numel() for x in (held, ours))
    return f"{_FP8} values at most" if some <= _FP8 < all_ // 2 and _apart(ours, held) <= _NEAR else ""


def _adapter_counts(
    held: Mapping[str, torch.Tensor], ours: Mapping[str, PolicyTensor], dtype: torch.dtype
) -> float | None:
    """How many times the adapters count in the engine's tensors, where that is not once; None otherwise.

    Least squares of held = base + c (merged - base), which leaves no more than rounding. Older adapters are smaller:
    c below 1 is evidence where it leaves next to nothing of the adapters themselves.
    """
    pairs = [(ours[name], values) for name, values in held.items() if ours[name].adapted]
    parts = [(t.parameter.detach().to(v), t.tensor.to(v), v) for t, v in pairs if t.parameter.shape == v.shape]
    square = sum(float((merged - base).square().sum()) for base, merged, _ in parts)
    if len(parts) < len(held) or not square:
        return None
    c = sum(float(((v - base) * (merged - base)).sum()) for base, merged, v in parts) / square
    left, rounding, size = 0.0, 0.0, 0.0
    for base, merged, v in parts:
        left += float((v - base - c * (merged - base)).abs().mean())
        rounding += float(_steps(v, dtype).mean())
        size += float((merged - base).abs().mean())
    in_part = _IN_PART[0] < c < _IN_PART[1] and left <= _ALIKE * size
    return c if (c > _MORE_THAN_ONCE or in_part) and left <= rounding else None


def _swaps(
    ours: Mapping[str, PolicyTensor], differing: Sequence[HeldTensor]
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """What parameters have to be, adapters switched off, for the policy to hold what the engine does."""
    values = {t.parameter: t.tensor for t in ours.values() if t.adapted}
    return values | {ours[h.name].parameter: h.values for h in differing if h.values is not None}


def rounded_weights(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """The trainer scores with its own weights rounded to the engine's dtype."""
    require_engine(batch)
    if batch.sharded:
        raise NotPossible("the policy is sharded: its weights can't be swapped here")
    dtype = batch.engine.dtype if batch.engine is not None else torch.bfloat16
    finer = [p for p in batch.model.parameters() if p.is_floating_point() and _bits(p.dtype) > _bits(dtype)]
    if not finer:
        return None
    return Candidate(
        counterfactual=with_forward(current, weights="rounded"),
        finding=f"{len(finer)} tensors are {dtype_name(finer[0].dtype)} here and {dtype_name(dtype)} in the engine",
    )


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


WEIGHT_SYNC: tuple[Probe, ...] = (
    probe("engine's weights", "stale_weights", "weights", engine_weights,
           "the engine holds other weights", "with the weights it holds, the trainer agrees",
           uses=("engine_weights",), gives=("engine_weights",)),
    probe("rounded weights", "dtype_gap", "weights", independent(rounded_weights),
           "the trainer's weights are finer than the engine's", "rounded to its dtype, they agree"),
)  # fmt: skip
