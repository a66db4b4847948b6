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
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .config import ParityConfig
from .distributed import gather_rows
from .engine.live import ColocatedEngine
from .engine.server import ServerEngine, reachable
from .metrics import MismatchSums, compute, measure
from .recompute import causal_lm
from .records import RolloutBatch, ScoredBatch
from .scalars import FLOORED

if TYPE_CHECKING:
    from .taps import Capture

__all__ = ["SOURCES", "NoiseFloor", "compute_dtype", "eval_mode", "measure_floor", "noise_dtype", "rounding_noise"]

logger = logging.getLogger(__name__)

SOURCES = ("rounding", "batch_shape", "engine")
_SINGLE_SEQUENCES = 4  # passed through the trainer one by one
_ENGINE_SEQUENCES = 4  # scored alone and together: one request each, and one for all


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Every layer in eval mode inside the block, each back as it was after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def rounding_noise(backbone: torch.nn.Module, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Round what every module of ``backbone`` takes in and puts out to ``dtype``, with a random last digit.

    The random numbers come from generators of their own.
    """
    half_ulp = torch.finfo(dtype).eps / 2
    generators: dict[torch.device, torch.Generator] = {}
    # a tensor handed on unchanged by the next module must not be rounded twice; held, so that no id is reused
    done: dict[int, torch.Tensor] = {}

    def noisy(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or id(x) in done:
            return x
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(seed)
        e = torch.rand(x.shape, dtype=torch.float32, device=x.device, generator=generators[x.device])
        e.mul_(2.0).sub_(1.0).mul_(half_ulp).add_(1.0)
        y = e.mul_(x).to(dtype).to(x.dtype)
        if len(done) > 8:
            done.pop(next(iter(done)))
        done[id(y)] = y
        return y

    def before(module: Any, args: Any) -> Any:
        return (noisy(args[0]), *args[1:]) if args else None

    def after(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (noisy(output[0]), *output[1:])
        return noisy(output)

    handles = []
    for module in backbone.modules():
        leaf = next(module.children(), None) is None
        if leaf:
            handles.append(module.register_forward_pre_hook(before))
        if module is not backbone:
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compute_dtype(capture: Capture) -> torch.dtype:
    """What the trainer's forward computes in: mixed precision, else the dtype of its weights."""
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(capture.trainer.accelerator.mixed_precision)
    return mixed or next(p.dtype for p in capture.policy.parameters() if p.is_floating_point())


def noise_dtype(engine: torch.dtype, capture: Capture) -> torch.dtype:
    """The coarser of the engine's dtype and the one the trainer computes in."""
    return max((engine, compute_dtype(capture)), key=lambda dtype: torch.finfo(dtype).eps)


@torch.no_grad()
def measure_floor(capture: Capture, config: ParityConfig) -> dict[str, MismatchSums]:
    """The sums of one side against itself, by source, on this rank's share; reduce and hand to :class:`NoiseFloor`.

    Every rank must call it: the passes over a sharded model are collective, and one rank asks a server for its dtype.
    A source that failed has ``errors=1``.
    """
    engine = reachable(capture.generation, config.server_timeout)
    dtype, head_dtype = _engine_dtypes(engine, capture, config)  # first: nothing that fails on one rank alone
    dtype = noise_dtype(dtype, capture)
    rollout = capture.rollout()
    rows = capture.rows_within(rollout, config.floor_tokens)
    mask = rollout.engine_mask[rows]
    backbone = causal_lm(capture.policy).base_model

    with eval_mode(capture.policy):
        plain = capture.forward(rollout, rows).logprobs
        with rounding_noise(backbone, dtype, seed=rollout.step):
            logits_dtype = None if head_dtype == torch.float32 else head_dtype
            rounded = capture.forward(rollout, rows, logits_dtype=logits_dtype).logprobs
        few = rows[:_SINGLE_SEQUENCES]
        single = capture.forward(rollout, few, batch_size=1).logprobs
    sources = {
        "rounding": _against_itself(rounded, plain, mask),
        "batch_shape": _against_itself(single, plain[: len(few)], mask[: len(few)]),
    }
    if engine is not None and engine.can_rescore():
        try:
            sources["engine"] = _engine_against_itself(engine, rollout, rows[:_ENGINE_SEQUENCES])
        except Exception as e:  # the trainer's sources stand without it
            logger.warning("the engine could not score its own tokens (%s: %s)", type(e).__name__, e)
    return sources


def _engine_dtypes(
    engine: ColocatedEngine | ServerEngine | None, capture: Capture, config: ParityConfig
) -> tuple[torch.dtype, torch.dtype]:
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


def _engine_against_itself(
    engine: ColocatedEngine | ServerEngine, rollout: RolloutBatch, rows: torch.Tensor
) -> MismatchSums:
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


class NoiseFloor:
    """The floor in force, when it is measured anew, and what it has cost. All from reduced numbers.

    ``values``: ``floor/<stat>`` for every statistic of :data:`~trl_parity.scalars.FLOORED`, the largest of its sources
    (``ess``: the smallest); empty before the first measurement. ``sources``: the same by source.
    """

    def __init__(self, config: ParityConfig):
        self._every, self._share = config.floor_every_n_windows, config.floor_cost_share
        self.enabled = config.floor_tokens > 0
        self.sources: dict[str, dict[str, float]] = {}
        self.values: dict[str, float] = {}
        self.age = 0  # windows since it was measured, or last tried in vain
        self._tried = False
        self.seconds = 0.0  # summed over ranks and measurements
        self.last_seconds = 0.0
        self.wall = 0.0  # summed over ranks

    @property
    def due(self) -> bool:
        """Whether the coming window shall measure it."""
        if not self.enabled:
            return False
        if not self.values:
            return not self._tried or self.age >= self._every
        return self.age >= self._every and self.seconds + self.last_seconds <= self._share * self.wall

    def update(self, sources: Mapping[str, MismatchSums]) -> bool:
        """Take over (reduced) measurements. False, and everything as before, when none of them has a token."""
        found: dict[str, dict[str, float]] = {}
        for name, sums in sources.items():
            stats = compute(sums)
            values = {stat: stats[f"trimmed/{stat}"] for stat in FLOORED}
            if all(value is not None and math.isfinite(value) for value in values.values()):
                found[name] = {stat: float(value or 0.0) for stat, value in values.items()}
        self._tried = True
        if "rounding" not in found:
            self.age = self.age if self.values else 0
            return False
        self.sources, self.age = found, 0
        for stat in FLOORED:
            measured = [values[stat] for values in found.values()]
            self.values[f"floor/{stat}"] = min(measured) if stat == "ess" else max(measured)
        return True

    def account(self, floor_seconds: float, wall_seconds: float) -> None:
        """Add one window's (reduced) seconds."""
        self.seconds += floor_seconds
        self.wall += wall_seconds
        if floor_seconds:
            self.last_seconds = floor_seconds

    def scalars(self, stats: Mapping[str, float | None]) -> dict[str, float | None]:
        """``floor/*`` and ``excess/*`` of a window."""
        out: dict[str, float | None] = dict(self.values)
        if self.enabled:
            out["cost/floor_share"] = self.seconds / self.wall if self.wall else None
            out["floor/age"] = float(self.age)
        for stat in FLOORED:
            value, floor = stats.get(f"trimmed/{stat}"), self.values.get(f"floor/{stat}")
            if value is not None and floor is not None:
                out[f"excess/{stat}"] = floor - value if stat == "ess" else value - floor
        return out

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        names = ("sources", "values", "age", "seconds", "last_seconds", "wall")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`; a floor switched off or on since then stays as the settings say."""
        if self.enabled:
            for name, value in state.items():
                setattr(self, name, value)
