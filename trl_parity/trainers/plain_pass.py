"""A forward pass of a backbone, without the trainer's part in it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["pictures_of", "run_backbone"]

_TOGETHER = 8  # rows, where nobody says how many


@torch.no_grad()
def run_backbone(
    capture: Any,
    backbone: Any,
    ids: torch.Tensor,
    attention: torch.Tensor,
    keep: int,
    rows: torch.Tensor,
    batch_size: int | None = None,
) -> None:
    """Pass sequences through it in the run's mixed precision: for what hooks see of it.

    ``capture``: the ``Capture`` of the batch. ``ids``, ``attention``: (B, P + keep). ``rows`` (B,): theirs of the
    batch, whose pictures are given along.
    """
    size = batch_size or _TOGETHER
    with capture.trainer.accelerator.autocast():
        for some, mask, at in zip(*(x.split(size) for x in (ids, attention, rows)), strict=True):
            images = pictures_of(capture, at, ids.shape[1], keep)
            backbone(input_ids=some, attention_mask=mask, use_cache=False, **images)


def pictures_of(capture: Any, rows: torch.Tensor, width: int, keep: int) -> dict[str, Any]:
    """The model's arguments for the pictures of rows that are passed at once: the trainer's without counts."""
    given = capture.image_inputs(rows, width, keep)
    return {name: value for name, value in given.items() if not name.startswith("num_")}
