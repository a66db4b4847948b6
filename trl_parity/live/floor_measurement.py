"""The noise floor: how far one side disagrees with itself, for reasons no setting can mend.

Three sources, each on a few sequences of the current batch, none of which a fault between the two sides can reach:

- ``rounding``: the trainer against itself with activations and logits rounded in the engine's dtype. Each module's
  output is multiplied by 1 + e, e uniform within half a unit in the last place, and rounded (Monte Carlo arithmetic,
  Parker 1997): one more draw of the rounding errors another implementation of the same model makes. The weights stay
  as they are: what rounding *them* does is a fault to be seen (``dtype_gap``), no noise.
- ``batch_shape``: the trainer against itself, one sequence at a time instead of all together, in the same padding.
- ``engine``: the engine scoring the same tokens alone and in a batch, by prefill, at temperature 1.

Of a mixture of experts rounding's is told a second time, as ``same_experts``: with the tokens whose routers rounding
flips held to the experts they had. It is no part of the floor, and says how much of it flips are.

All trainer passes run in eval mode, so that layers left in training mode are no floor either. What a source says is
summed up by groups of sequences, since noise differs from one to the next: ``NoiseFloor`` bounds it by how much.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from ..collectives import gather_rows
from ..config.parity import ParityConfig
from ..engine.base import Capability, Engine
from ..judging.noise_floor import GROUPS, SAME_EXPERTS
from ..metrics.statistics import measure
from ..metrics.sums import MismatchSums
from ..records import RolloutBatch, ScoredBatch
from ..scoring.experts import Routes, expert_layers
from ..scoring.model_head import backbone_of
from ..scoring.perturb import eval_mode, rounding_noise
from ..trainers.some_rows import rows_of_tokens

if TYPE_CHECKING:
    from ..trainers.capture import Capture

__all__ = ["measure_floor", "noise_dtype"]

logger = logging.getLogger(__name__)

_LEAST_SEQUENCES = 8  # over all ranks, where the batch has them

_SINGLE_SEQUENCES = 4  # passed through the trainer one by one

_ENGINE_SEQUENCES = 4  # scored alone and together: one request each, and one for all


def noise_dtype(engine: torch.dtype, capture: Capture) -> torch.dtype:
    """The coarser of the engine's dtype and the one the trainer computes in."""
    return max((engine, capture.compute_dtype), key=lambda dtype: torch.finfo(dtype).eps)


@torch.no_grad()
def measure_floor(capture: Capture, config: ParityConfig) -> dict[str, list[MismatchSums]]:
    """The sums of one side against itself, by source and group, on this rank's share: for ``NoiseFloor``.

    Empty, at no cost, where no sequence of this rank (sharded weights: of any) has a token to compare. Every rank must
    call it: the passes over a sharded model are collective, and one rank asks a server for its dtype.
    """
    engine = capture.engine
    dtype, head_dtype = _engine_dtypes(engine, capture, config)  # first: nothing that fails on one rank alone
    dtype = noise_dtype(dtype, capture)
    rollout = capture.rollout()
    if capture.sharded:  # from here on passes: nobody begins where another can't
        gather_rows([])
    rows = rows_of_tokens(capture, rollout, config.floor_tokens, _LEAST_SEQUENCES)
    if not len(rows):
        return {}
    mask = rollout.engine_mask[rows]
    accelerator = capture.trainer.accelerator
    groups = accelerator.process_index + accelerator.num_processes * torch.arange(len(rows))
    backbone, routes = backbone_of(capture.policy), Routes(expert_layers(capture.policy))
    logits_dtype = None if head_dtype == torch.float32 else head_dtype

    def rounded_pass() -> torch.Tensor:
        with rounding_noise(backbone, dtype, seed=rollout.step):
            return capture.forward(rollout, rows, logits_dtype=logits_dtype)[0].logprobs

    with eval_mode(capture.policy):
        with routes.noted():
            plain = capture.forward(rollout, rows)[0].logprobs
        rounded = rounded_pass()
        with routes.held() if routes.known else nullcontext():
            held = rounded_pass() if routes.known else None
        few = _some(len(rows), _SINGLE_SEQUENCES)
        single = capture.forward(rollout, rows[few], batch_size=1)[0].logprobs
    sources = {
        "rounding": _against_itself(rounded, plain, mask, groups),
        "batch_shape": _against_itself(single, plain[few], mask[few], groups[: len(few)]),
    }
    if held is not None:
        sources[SAME_EXPERTS] = _against_itself(held, plain, mask, groups)
        sources[SAME_EXPERTS][int(groups[0]) % GROUPS].bump(routed=routes.tokens, flipped=routes.flips)
    askable = rollout.image_keys is None or capture.pictures is not None
    if engine is not None and Capability.RESCORE in engine.capabilities and askable:
        try:
            few = _some(len(rows), _ENGINE_SEQUENCES)
            sources["engine"] = _engine_against_itself(engine, capture, rollout, rows[few], groups[: len(few)])
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


def _some(total: int, count: int) -> torch.Tensor:
    """Evenly spaced places: neighbours are often completions of one prompt."""
    count = min(total, count)
    return torch.arange(count) * total // count


def _against_itself(
    one: torch.Tensor, other: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor
) -> list[MismatchSums]:
    """Sums of each group; ``groups`` (B,) numbers sequences over ranks, dealt out in turn."""
    sums = []
    for group in range(GROUPS):
        rows = (groups % GROUPS == group).nonzero()[:, 0].to(other.device)
        scored = ScoredBatch(
            mask=mask.to(other.device)[rows], rollout_logprobs=other[rows], trainer_logprobs=one[rows],
            own_logprobs=one[rows], entropy=None,
        )  # fmt: skip
        sums.append(measure(scored, bootstrap_samples=2))
    return sums


def _engine_against_itself(
    engine: Engine, capture: Capture, rollout: RolloutBatch, rows: torch.Tensor, groups: torch.Tensor
) -> list[MismatchSums]:
    sequences, lengths, kept = [], [], []
    for row, group in zip(rows.tolist(), groups.tolist(), strict=True):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()].tolist()
        completion = rollout.completion_ids[row][rollout.completion_mask[row].bool()].tolist()
        if prompt and completion and len(prompt) + len(completion) < engine.max_model_len:
            sequences.append(capture.for_engine(row, prompt + completion))
            lengths.append(len(completion))
            kept.append(group)
    if not sequences:
        return [MismatchSums.zeros(bootstrap_samples=2)] * GROUPS
    together = engine.rescore(sequences)
    alone = [engine.rescore([ids])[0] for ids in sequences]
    one, other = (
        pad_sequence([scores[-n:] for scores, n in zip(side, lengths, strict=True)], batch_first=True)
        for side in (alone, together)
    )
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return _against_itself(one, other, mask, torch.tensor(kept))
