"""Updates that come before any callback: DeepSpeed's, inside backward. Held at its optimizers, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..collectives import fail_together
from ..errors import ConfigError, InterceptionError
from ..trainers.instrumentation import observer_of

__all__ = ["HeldUpdates", "refuse_unheld"]


class HeldUpdates:
    """DeepSpeed's updates, each announced before it moves a weight, and not applied where it is condemned.

    DeepSpeed's own optimizer clips, hands its gradients to the torch optimizer inside, copies the weights back and
    clears its buffers. In a condemned update the ``step`` of the one inside does nothing and the rest runs as ever:
    weights and moments keep every bit, and no gradient is left for the next update.

    The trainer's observer is asked once an update, at the same point on every rank (``before_update``); what it raises
    leaves the weights as they are.

    Raises:
        ConfigError: (from backward) weights of a condemned update have moved all the same.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._announced = self._condemned = False

    @classmethod
    def of(cls, trainer: Any) -> HeldUpdates:
        """Those of this trainer, which may train again with the same optimizers."""
        outer = inner = trainer.accelerator.deepspeed_engine_wrapped.engine.optimizer
        if not hasattr(outer, "held_updates"):
            held = outer.held_updates = cls(trainer)
            while hasattr(inner, "optimizer"):
                inner = inner.optimizer
            # ZeRO-3 has two where an offload ratio leaves a part on the device
            for optimizer in (inner, getattr(outer, "backup_optimizer", None)):
                if optimizer is not None:
                    optimizer.step = held._unless_condemned(optimizer.step)
            outer.step = held._announced_before(outer.step)
        return outer.held_updates

    def over(self, condemned: bool) -> None:
        """An update is over. Raises InterceptionError if it is condemned and was not announced."""
        if condemned and not self._announced:
            raise InterceptionError(
                "a condemned batch was due for its update and DeepSpeed's optimizer made no step. Expected one in "
                "each update: does the DeepSpeed config accumulate over other steps than gradient_accumulation_steps?"
            )
        self._announced = False

    def _unless_condemned(self, step: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: None if self._condemned else step(*args, **kwargs)

    def _announced_before(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def announced(*args: Any, **kwargs: Any) -> None:
            observer = observer_of(self._trainer)
            self._announced, self._condemned = True, observer is not None and observer.before_update()
            weights = self._weights() if self._condemned else []
            step(*args, **kwargs)
            if not self._condemned:
                return
            self._condemned = False
            error = "" if self._weights() == weights else (
                "DeepSpeed moved weights in an update whose step did nothing. Expected them to stay, since its batch "
                "was condemned: this DeepSpeed config updates elsewhere. Use action='raise' or 'log' with it."
            )  # fmt: skip
            fail_together(error, self._trainer.args.world_size)

        return announced

    @torch.no_grad()
    def _weights(self) -> list[float]:
        """A sum of each that this rank holds in memory."""
        parameters = [p for p in self._trainer.model.parameters() if getattr(p, "nvme_swapper", None) is None]
        shards = (getattr(p, "ds_tensor", p) for p in parameters if p.requires_grad)
        return [float(torch.nan_to_num(shard).sum(dtype=torch.float64)) for shard in shards]


def refuse_unheld(args: Any, action: str) -> None:
    """Raise ConfigError where an update can't be held, before an engine is built, if ``action`` would have to."""
    if action not in ("skip_update", "stop"):
        return
    plugin = getattr(args, "deepspeed_plugin", None)
    config = {} if plugin is None else plugin.deepspeed_config
    zero = config.get("zero_optimization") or {}
    kind = str((config.get("optimizer") or {}).get("type", ""))
    optim = getattr(args, "optim", "")
    optim = str(getattr(optim, "value", optim))
    elsewhere = {
        "DeepSpeed's zero_optimization.zenflow": zero.get("zenflow"),
        "DeepSpeed's offload_optimizer.super_offload": (zero.get("offload_optimizer") or {}).get("super_offload"),
        f"DeepSpeed's optimizer.type {kind!r}": kind.lower() == "muon",  # its momentum is part of the reduction
        f"optim={optim!r}": "layerwise" in optim or "lomo" in optim,
    }
    for setting, found in elsewhere.items():
        if found:
            raise ConfigError(
                f"{setting} with action={action!r}: it moves weights or moments within backward. Expected an update "
                "in the optimizer's step, where a condemned one is kept out. Leave it or set action='raise' or 'log'."
            )
