"""What the head's functions are given, looked at: errors that say what was seen, what was expected and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .head_spec import Head

__all__ = ["check", "check_targets", "check_top", "misfit"]


def check(hidden: torch.Tensor, head: Head) -> None:
    """Refuse hidden states and a head that do not go together (ValueError)."""
    # messages are made only where one is needed: formatting them all would cost as much as a small head
    weight, bias = head.weight, head.bias
    if not (weight.ndim == 2 and weight.is_floating_point() and weight.numel() > 0):
        raise misfit(
            f"head.weight is {weight.dtype} {tuple(weight.shape)}",
            "a non-empty floating (V, H)",
            "Pass the output embedding's weight; gather a sharded and dequantise a quantised one first.",
        )
    rows, width = weight.shape
    if not (hidden.ndim == 2 and hidden.shape[1] == width and hidden.is_floating_point()):
        raise misfit(
            f"hidden is {hidden.dtype} {tuple(hidden.shape)}",
            f"floating (N, {width}) to fit head.weight",
            "Flatten batch and time, and take the states that enter the LM head.",
        )
    if not 1 <= head.vocab_used <= rows:
        raise misfit(
            f"head.vocab_size is {head.vocab_size}",
            f"1 to {rows}, the rows of head.weight",
            "Pass the number of tokens the model can emit, or None to count every row.",
        )
    if bias is not None and bias.shape != (rows,):
        raise misfit(
            f"head.bias has shape {tuple(bias.shape)}",
            f"({rows},), one entry for each row of head.weight",
            "Pass the same layer's bias.",
        )
    for a, b, _ in head.low_rank:
        if not (a.ndim == 2 and a.shape[1] == width and b.shape == (rows, a.shape[0])):
            raise misfit(
                f"head.low_rank has A {tuple(a.shape)} and B {tuple(b.shape)}",
                f"A (r, {width}) and B ({rows}, r)",
                "Pass lora_A.weight and lora_B.weight, in this order.",
            )
    tensors = [weight, *(t for a, b, _ in head.low_rank for t in (a, b)), *([] if bias is None else [bias])]
    if any(t.device != hidden.device for t in tensors):
        raise misfit(
            f"hidden is on {hidden.device}, the head on {', '.join(sorted({str(t.device) for t in tensors}))}",
            "one device",
            "Move hidden to the head's device.",
        )
    if not (head.temperature > 0 and (head.softcap is None or head.softcap > 0)):
        raise misfit(
            f"head.temperature is {head.temperature} and head.softcap {head.softcap}",
            "both above 0 (softcap may be None)",
            "For greedy sampling score with temperature 1.",
        )


def check_targets(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> None:
    """Refuse targets of another form; on a CPU also those outside the vocabulary: elsewhere that would wait."""
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64 or targets.device != hidden.device:
        raise misfit(
            f"targets are {targets.dtype} {tuple(targets.shape)} on {targets.device}",
            f"torch.int64 ({hidden.shape[0]},) on {hidden.device}",
            "Pass one token id for each row of hidden.",
        )
    if targets.device.type == "cpu" and len(targets):
        low, high = (int(t) for t in targets.aminmax())
        if low < 0 or high >= head.vocab_used:
            raise misfit(
                f"targets run from {low} to {high}",
                f"0 to {head.vocab_used - 1}",
                "Leave out padding and ignored labels (-100) first, and check head.vocab_size.",
            )


def check_top(top: torch.Tensor, hidden: torch.Tensor, head: Head) -> None:
    """Refuse a place for the most likely tokens that can't hold them."""
    fits = top.ndim == 2 and len(top) == len(hidden) and 1 <= top.shape[1] <= head.vocab_used
    if not fits or top.dtype != torch.float32 or top.device != hidden.device:
        raise misfit(
            f"top is {top.dtype} {tuple(top.shape)} on {top.device}",
            f"torch.float32 ({len(hidden)}, 1 to {head.vocab_used}) on {hidden.device}",
            "Pass such a tensor, or none.",
        )


def misfit(saw: str, expected: str, do: str) -> ValueError:
    """The error of all of them."""
    return ValueError(f"{saw}, expected {expected}. {do}")
