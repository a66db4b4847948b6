"""What a checkpoint of the trainer keeps of a run, and a run that goes on from one: alike on every rank."""

from __future__ import annotations

import logging
from typing import Any

from ..collectives import gather_rows, together
from ..errors import ConfigError
from .trainer_run import TrainerRun

__all__ = ["checkpoint_of", "restore"]

logger = logging.getLogger(__name__)


def checkpoint_of(run: TrainerRun) -> dict[str, Any]:
    """What transformers keeps of a callback: the settings and the monitor's memory; nothing where that fails."""
    with run.judge.stages("checkpoint"):
        checkpoint = run.judge.state() | run.pipeline.window.state()
        if run.skipped:
            checkpoint["skipped"] = run.skipped
        return {"args": run.config.to_dict(), "attributes": {"checkpoint": checkpoint}}
    return {"args": {}, "attributes": {}}


def restore(run: TrainerRun, saved: Any, args: Any, state: Any) -> None:
    """Go on from what ``checkpoint_of`` kept. Collective: one that can't be read on a rank is begun anew on all.

    Raises ConfigError where it can't be read and ``on_state_mismatch`` says so.
    """
    if isinstance(saved, list):
        saved = saved[0] if saved else None
    checkpoint = (saved or {}).get("attributes", {}).get("checkpoint")
    seen = ""
    try:
        settings = (saved or {}).get("args") or {}
        known = together(lambda: _load(run, checkpoint, settings, args, state), args.world_size)
    except ConfigError:
        raise
    except Exception as e:
        if run.config.on_state_mismatch == "error":
            raise ConfigError(
                f"the checkpoint's trl-parity state can't be read ({type(e).__name__}: {e}). Resume from another, or "
                "set on_state_mismatch='restart' to begin with an empty streak and a new noise floor."
            ) from e
        known, seen = False, f" ({type(e).__name__}: {e})"
    if not known:
        _forget(run, state)
        logger.warning(
            "the checkpoint of step %d holds no trl-parity state this version reads%s; the streak starts at 0 and "
            "the noise floor is measured anew.", state.global_step, seen,
        )  # fmt: skip


def _load(run: TrainerRun, checkpoint: Any, settings: Any, args: Any, state: Any) -> bool:
    known = run.judge.load_state(checkpoint)
    if args.world_size > 1:  # each rank reads a file, and may not find the same
        known = all(row["known"] for row in gather_rows([{"known": known}]))
    if not known:
        return False
    run.resume(settings, int(checkpoint.get("skipped", 0)))
    if not run.pipeline.window.load_state(checkpoint, args.device, state.is_world_process_zero):
        logger.warning("bootstrap_samples changed: the first part of the window open at the checkpoint is dropped")
    return True


def _forget(run: TrainerRun, state: Any) -> None:
    """Begin anew, whatever was read before it failed."""
    run.judge.reset()
    run.pipeline.window.begin(int(state.global_step))
