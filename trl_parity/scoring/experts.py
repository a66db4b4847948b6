"""A policy with experts: which of them its routers take, and the same policy where some tokens take others.

In transformers every mixture of experts calls a module of its experts as ``experts(hidden (n, H), index (n, k),
weights (n, k))``: what the router chose passes by there, whatever way it was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["ExpertLayer", "Forced", "Routes", "expert_layers", "forced"]


@dataclass(frozen=True, slots=True, eq=False)
class Forced:
    """Of one layer and one sequence: the experts that some of its n tokens take, and with which weights."""

    tokens: torch.Tensor  # (n,) bool: those that do
    experts: torch.Tensor  # (n, k)
    weights: torch.Tensor  # (n, k)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLayer:
    """A router with its experts."""

    name: str
    block: torch.nn.Module
    experts: torch.nn.Module

    def choice(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and weights (n, k) that the router takes for these hidden states (n, H).

        Raises ValueError where the layer hands its choice on in another form, and what the layer does.
        """
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def note(module: Any, args: Any) -> None:
            seen.append(_chosen(self.name, args))

        parameter = next(self.block.parameters())
        handle = self.experts.register_forward_pre_hook(note)
        try:
            with torch.no_grad():
                self.block(hidden.to(parameter.device, parameter.dtype)[None])
        finally:
            handle.remove()
        return seen[0]


def expert_layers(model: torch.nn.Module) -> list[ExpertLayer]:
    """The model's layers of experts, in order; empty of a dense one."""
    return [
        ExpertLayer(f"{name}.{child}" if name else child, block, experts)
        for name, block in model.named_modules()
        for child, experts in block.named_children()
        if type(experts).__name__.endswith("Experts") and "Shared" not in type(experts).__name__
    ]


@contextmanager
def forced(layers: Sequence[ExpertLayer], choices: Sequence[Forced]) -> Iterator[None]:
    """Inside: in passes over the one sequence, the tokens of each layer take these experts."""
    with ExitStack() as stack:
        for layer, choice in zip(layers, choices, strict=True):
            handle = layer.experts.register_forward_pre_hook(_instead(layer.name, choice))
            stack.callback(handle.remove)
        yield


class Routes:
    """What the routers of some layers chose in a pass, and the same pass again without what flips on the way.

    ``tokens``: choices that were made again, of all layers; ``flips``: those of other experts than before.
    """

    def __init__(self, layers: Sequence[ExpertLayer]):
        self._layers = layers
        self._noted: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in layers]
        self._known = bool(layers)
        self.tokens, self.flips = 0, 0

    @property
    def known(self) -> bool:
        """Whether they could be read in each call."""
        return self._known and all(self._noted)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside: what is chosen in each call is kept."""

        def note(i: int, name: str, args: Any) -> None:
            try:
                self._noted[i].append(_chosen(name, args))
            except ValueError:
                self._known = False

        with self._hooked(note):
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the calls being as many and as large: tokens that would take other experts take those noted."""
        left = [iter(calls) for calls in self._noted]

        def hold(i: int, name: str, args: Any) -> Any:
            (experts, weights), (before, given) = _chosen(name, args), next(left[i])
            flipped = (experts.sort(-1).values != before.sort(-1).values).any(-1, keepdim=True)
            self.tokens += len(flipped)
            self.flips += int(flipped.sum())
            return (args[0], torch.where(flipped, before, experts), torch.where(flipped, given, weights), *args[3:])

        with self._hooked(hold):
            yield

    @contextmanager
    def _hooked(self, hook: Callable[[int, str, Any], Any]) -> Iterator[None]:
        with ExitStack() as stack:
            for i, layer in enumerate(self._layers):
                handle = layer.experts.register_forward_pre_hook(
                    lambda module, args, i=i, name=layer.name: hook(i, name, args)
                )
                stack.callback(handle.remove)
            yield


def _instead(name: str, choice: Forced) -> Any:
    def hook(module: Any, args: Any) -> Any:
        experts, weights = _chosen(name, args)
        if experts.shape != choice.experts.shape:
            raise ValueError(f"{name} routes {tuple(experts.shape)} tokens and experts, not {choice.experts.shape}")
        tokens = choice.tokens.to(experts.device)[:, None]
        experts = torch.where(tokens, choice.experts.to(experts.device, experts.dtype), experts)
        weights = torch.where(tokens, choice.weights.to(weights.device, weights.dtype), weights)
        return (args[0], experts, weights, *args[3:])

    return hook


def _chosen(name: str, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts and weights (n, k) among the arguments."""
    ok = len(args) >= 3 and all(isinstance(x, torch.Tensor) and x.ndim == 2 for x in args[1:3])
    if not ok or args[1].is_floating_point() or args[1].shape != args[2].shape:
        raise ValueError(f"{name} is not called with experts and weights of each token: how it routes can't be read")
    return args[1], args[2]
