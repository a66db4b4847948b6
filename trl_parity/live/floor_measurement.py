"""The noise floor: how far one side disagrees with itself, for reasons no setting can mend.

Three sources, each on a few sequences of the current batch, none of which a fault between the two sides can reach:

- ``rounding``: the trainer against itself with activations and logits rounded in the engine's dtype. Each module's
  output is multiplied by 1 + e, e uniform within half a unit in the last place, and rounded (Monte Carlo arithmetic,
  Parker 1997): one more draw of the rounding errors another implementation of the same model makes. The weights stay
  as they are: what rounding *them* does is a fault to be seen (``dtype_gap``), no noise.
- ``batch_shape``: the trainer against itself, one sequence at a time instead of all together, in the same padding.
- ``engine``: the engine scoring the same tokens alone and in a batch, by prefill, at temperature 1.

All trainer passes run in eval mode, so that layers left in training mode are no floor either.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from ..collectives import gather_rows
from ..config.parity import ParityConfig
from ..engine.base import Capability, Engine
from ..metrics.statistics import measure
from ..metrics.sums import MismatchSums
from ..records import RolloutBatch, ScoredBatch
from ..scoring.model_head import causal_lm
from ..scoring.perturb import eval_mode, rounding_noise

if TYPE_CHECKING:
    from ..trainers.capture import Capture

__all__ = ["measure_floor", "noise_dtype"]

logger = logging.getLogger(__name__)

_SINGLE_SEQUENCES = 4  # passed through the trainer one by one

_ENGINE_SEQUENCES = 4  # scored alone and together: one request each, and one for all


def noise_dtype(engine: torch.dtype, capture: Capture) -> torch.dtype:
    """The coarser of the engine's dtype and the one the trainer computes in."""
    return max((engine, capture.compute_dtype), key=lambda dtype: torch.finfo(dtype).eps)


@torch.no_grad()
def measure_floor(capture: Capture, config: ParityConfig) -> dict[str, MismatchSums]:
    """The sums of one side against itself, by source, on this rank's share; reduce and hand to ``NoiseFloor``.

    Every rank must call it: the passes over a sharded model are collective, and one rank asks a server for its dtype.
    A source that failed has ``errors=1``.
    """
    engine = capture.engine
    dtype, head_dtype = _engine_dtypes(engine, capture, config)  # first: nothing that fails on one rank alone
    dtype = noise_dtype(dtype, capture)
    rollout = capture.rollout()
    rows = capture.rows_within(rollout, config.floor_tokens)
    mask = rollout.engine_mask[rows]
    backbone = causal_lm(capture.policy).base_model

    with eval_mode(capture.policy):
        plain = capture.forward(rollout, rows)[0].logprobs
        with rounding_noise(backbone, dtype, seed=rollout.step):
            logits_dtype = None if head_dtype == torch.float32 else head_dtype
            rounded = capture.forward(rollout, rows, logits_dtype=logits_dtype)[0].logprobs
        few = rows[:_SINGLE_SEQUENCES]
        single = capture.forward(rollout, few, batch_size=1)[0].logprobs
    sources = {
        "rounding": _against_itself(rounded, plain, mask),
        "batch_shape": _against_itself(single, plain[: len(few)], mask[: len(few)]),
    }
    if engine is not None and Capability.RESCORE in engine.capabilities:
        try:
            sources["engine"] = _engine_against_itself(engine, rollout, rows[:_ENGINE_SEQUENCES])
        except Exception as e:  # the trainer's sources stand without it
            logger.warning("the engine could not score its own tokens (%s: %s)", type(e).__name__, e)
    return sources


def _engine_dtypes(engine: Engine | None, capture: Capture, config: ParityConfig) -> tuple[torch.dtype, torch.dtype]:
    """Of the engine's activations and of its logits, the same on every rank. Collective where a server serves many."""
    told: list[str] | None = None
    try:
        if engine is not None:
            told = [str(engine.dtype), str(engine.head_dtype)]
    except Exception as e:  # a server of another vLLM: as if it had not answered, and the others don't wait
        logger.warning("the engine's dtype can't be read (%s: %s)", type(e).__name__, e)
    served = capture.generation is not None and capture.generation.mode == "server"
    if served and capture.trainer.accelerator.num_processes > 1:
        told = next((row["told"] for row in gather_rows([{"told": told}]) if row["told"]), None)
    if told is None:
        name = config.engine_dtype or str(noise_dtype(torch.float32, capture))
        told = [name, name]
    dtype, head_dtype = (getattr(torch, name.removeprefix("torch.")) for name in told)
    return dtype, head_dtype


def _against_itself(one: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> MismatchSums:
    scored = ScoredBatch(
        mask=mask.to(other.device), rollout_logprobs=other, trainer_logprobs=one, own_logprobs=one, entropy=None
    )
    return measure(scored, bootstrap_samples=2)


def _engine_against_itself(engine: Engine, rollout: RolloutBatch, rows: torch.Tensor) -> MismatchSums:
    sequences, lengths = [], []
    for row in rows.tolist():
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()].tolist()
        completion = rollout.completion_ids[row][rollout.completion_mask[row].bool()].tolist()
        if prompt and completion and len(prompt) + len(completion) < engine.max_model_len:
            sequences.append(prompt + completion)
            lengths.append(len(completion))
    if not sequences:
        return MismatchSums.zeros(bootstrap_samples=2)
    together = engine.rescore(sequences)
    alone = [engine.rescore([ids])[0] for ids in sequences]
    one, other = (
        torch.cat([scores[-n:] for scores, n in zip(side, lengths, strict=True)])[None] for side in (alone, together)
    )
    return _against_itself(one, other, torch.ones_like(one, dtype=torch.bool))
