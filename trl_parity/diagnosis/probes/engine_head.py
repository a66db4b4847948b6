"""A probe of the engine's last step: the logits it makes of its own last hidden states, against the trainer's head."""

from __future__ import annotations

import torch

from ...scoring.dtypes import dtype_name
from ..counterfactual import Counterfactual, DiagnosedBatch
from ..findings import NOTHING, Findings
from .asking import on_trainers_weights, whole_sequences
from .base import Candidate, NotPossible, Probe, Unexplained, probe
from .same_states import on_same_states

__all__ = ["ENGINE_HEAD"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)

_LIKE = 0.1  # a law of the difference leaves this share of it at most

_ROUNDED = 4.0  # times what rounding to the head's dtype does: less, and no law of it, is that


def engine_head(
    batch: DiagnosedBatch, current: Counterfactual, findings: Findings
) -> tuple[Candidate | None, Findings]:
    """As if the engine's logits were what the trainer's head makes of the engine's own hidden states."""
    engine = on_trainers_weights(batch, findings)
    if engine is None:
        return None, NOTHING
    if batch.sharded:
        raise NotPossible("the policy's head is sharded over ranks")
    found = on_same_states(
        batch, current, whole_sequences(batch, engine, findings.engine_prompts),
        lambda whole, places: engine.last_states(whole.ids, places.tolist()),
    )  # fmt: skip
    cause, words = _in_words(found.others.float(), found.heads, engine.head_dtype, batch.redacted)
    if not cause:
        raise Unexplained(words)
    candidate = Candidate(
        counterfactual=found.counterfactual,
        over=found.over,
        cause=cause,
        finding=words,
        fix="" if cause != "model_definition" else _FIX,
    )
    return candidate, NOTHING


_FIX = (
    "compare what both sides do to logits after the head: vLLM's compute_logits and the model's logits processors (or "
    "a patch or plugin of theirs) against the trainer's scale, bias and soft cap."
)


def _in_words(theirs: torch.Tensor, ours: torch.Tensor, dtype: torch.dtype, redacted: bool) -> tuple[str, str]:
    """What logits (n, V) of the engine are to those of the trainer's head on the same states: the cause, and how.

    ``dtype``: of the engine's head. Logits that all lie on the grid of a narrower one were rounded to it. No cause:
    they are no further apart than two heads in that dtype.
    """
    gap = theirs - ours
    size = float(gap.abs().nan_to_num(0.0, posinf=0.0).mean())
    same = "on the engine's own hidden states the trainer's head makes other logits than the engine"
    for narrow in _DTYPES:
        on_grid = narrow.itemsize < dtype.itemsize and torch.equal(theirs.to(narrow).float(), theirs)
        left = float((theirs - ours.to(narrow).float()).abs().nan_to_num(0.0, posinf=0.0).mean())
        if on_grid or left < _LIKE * size:
            return "head_precision", f"{same}: the same rounded to {dtype_name(narrow)}"
    centered = gap - gap.mean(-1, keepdim=True)
    bias = centered.mean(0)
    if float((centered - bias).abs().mean()) < _LIKE * float(centered.abs().mean()):
        most = int(bias.abs().argmax())
        on = "one token" if redacted else f"token {most}"
        words = f"{same}, by one bias wherever they are: {float(bias[most]):+.3g} on {on} the most"
        return "constrained_decoding", words
    apart = f"{same} ({size:.3g} apart on average"
    rounding = float((ours.to(dtype).float() - ours).abs().nan_to_num(0.0, posinf=0.0).mean())
    if size < _ROUNDED * rounding:
        return "", f"{apart}: no more than sums in {dtype_name(dtype)} differ by)"
    return "model_definition", f"{apart})"


ENGINE_HEAD: tuple[Probe, ...] = (
    probe("engine's head", "model_definition", "last", engine_head,
          "the two sides make other logits of the same hidden states",
          "with the trainer's head on the engine's hidden states, the engine agrees with the trainer",
          uses=("engine_prompts", "engine_weights")),
)  # fmt: skip
