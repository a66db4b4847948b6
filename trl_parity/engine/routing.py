"""Which experts a colocated engine's layers take, read where its routers choose them.

vLLM's private ground: the ``router`` that each of its MoE runners keeps, whose ``select_experts`` is called with
hidden states and router logits; on a GPU also where the rest of the layer is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Routed", "Routing", "recorded"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """What one layer did with the n tokens of a sequence, k experts each."""

    hidden: torch.Tensor  # (n, H) what it was given
    logits: torch.Tensor  # (n, E) of its router
    experts: torch.Tensor  # (n, k)
    weights: torch.Tensor  # (n, k) of their outputs
    bias: torch.Tensor | None  # (E,) added to the scores for the choice alone; None: the router has none


@dataclass(slots=True)
class Routing:
    """The calls of one layer's router, in chunks of tokens."""

    router: Any
    calls: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    def of(self, n: int) -> Routed:
        """Of a sequence of n tokens. Raises RuntimeError where other tokens were routed as well."""
        if not self.calls:
            raise RuntimeError("the engine's kernel chooses experts by itself: what it takes can't be read")
        hidden, logits, weights, experts = (torch.cat(parts) for parts in zip(*self.calls, strict=True))
        if len(hidden) != n and (len(self.calls) > 1 or len(hidden) < n):  # one call may be padded at its end
            raise RuntimeError(f"a router of the engine was asked for {len(hidden)} tokens of a sequence of {n}")
        bias = getattr(self.router, "e_score_correction_bias", None)
        return Routed(hidden=hidden[:n], logits=logits[:n], experts=experts[:n].long(), weights=weights[:n].float(),
                      bias=None if bias is None else bias.detach().float())  # fmt: skip


@contextmanager
def recorded(model: torch.nn.Module) -> Iterator[list[Routing]]:
    """Inside: every choice of every layer's router is kept, in the order of the layers."""
    routers = [router for module in model.modules() if hasattr(router := vars(module).get("router"), "select_experts")]
    layers = [Routing(router) for router in routers]
    own = [vars(router).get("select_experts") for router in routers]  # somebody else's, in place of the class's
    try:
        for layer in layers:
            layer.router.select_experts = _watched(layer)
        yield layers
    finally:
        for layer, before in zip(layers, own, strict=True):
            vars(layer.router).pop("select_experts", None)
            if before is not None:
                layer.router.select_experts = before


def _watched(layer: Routing) -> Any:
    real = layer.router.select_experts

    def select_experts(hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        weights, experts = real(hidden_states, router_logits, *args, **kwargs)
        layer.calls.append(tuple(t.detach().clone() for t in (hidden_states, router_logits, weights, experts)))
        return weights, experts

    return select_experts
