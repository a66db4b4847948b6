"""What trl-parity asks of an engine, wherever it runs. ``colocated`` and ``server`` answer."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

if TYPE_CHECKING:
    import torch

    from .routing import Routed

__all__ = ["Capability", "Engine", "InProcessEngine", "in_process"]


class Capability(enum.Enum):
    """What not every engine can be asked. Ask ``engine.capabilities``, never for a class."""

    RESCORE = "score given tokens, from this rank alone"
    READ_MODEL = "hand out its module and the config that was built from"
    COUNT_CACHED = "tell how many tokens of a request were read from its prefix cache"


class Engine(Protocol):
    """A vLLM engine, by what can be asked of it from this rank.

    Everything that asks may raise: ConnectionError, where a server is gone or silent; RuntimeError, where the engine
    refuses, with its own words.
    """

    @property
    def failure(self) -> ConnectionError | None:
        """The answer that did not come: nothing more is asked before ``refresh``. None of one in this process."""

    def refresh(self) -> None:
        """Read its settings anew: of a server one short request, of an engine in this process nothing is copied."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this one can be asked."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and weights."""

    @property
    def head_dtype(self) -> torch.dtype:
        """Of the lm_head's product and of the logits."""

    @property
    def max_model_len(self) -> int:
        """Longest sequence it takes, in tokens."""

    @property
    def caches_prefixes(self) -> bool:
        """Whether keys and values of earlier requests are read again."""

    @property
    def instance(self) -> str:
        """Another one when the engine was started anew."""

    def setting(self, section: str, name: str, default: Any = None) -> Any:
        """One entry of a section of vLLM's config, as far as known."""

    def model_setting(self, name: str, default: Any = None) -> Any:
        """One entry of the transformers config the served module was built from, as far as known."""

    def settings(self) -> dict[str, Any]:
        """What ``lint.rules.Facts`` wants to know of an engine, by its names."""

    def everything(self) -> dict[str, Any]:
        """Settings worth keeping with an incident: JSON."""

    def rescore(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Log-prob of every token but the first under the engine's own prefill: T = 1, no processors, (len - 1,) each.

        Prompt log-probs never read the prefix cache, and what is written to it can't be read by the run's requests.
        """

    def next_token(
        self, contexts: Sequence[Sequence[int]], targets: Sequence[int], temperature: float, *, cached: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What it would report now for a token after a context, (N,), and how many tokens it read from cache, (N,).

        Temperature only, no other request setting. ``cached``: the prefix cache is read as the run's requests do,
        else each context is computed anew. Without ``COUNT_CACHED`` the second is 1 where cached, else 0.
        """


class InProcessEngine(Engine, Protocol):
    """One whose module lies in this process: ``Capability.READ_MODEL``."""

    def next_token(
        self,
        contexts: Sequence[Sequence[int]],
        targets: Sequence[int],
        temperature: float,
        *,
        cached: bool,
        features: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``features``: what it keeps of pictures is read all the same where nothing else of a cache is."""

    def continued(
        self, contexts: Sequence[Sequence[int]], tokens: int, temperature: float
    ) -> list[tuple[list[int], torch.Tensor]]:
        """What it samples now after each context, all at once: token ids, and what it reports for them, (n,)."""

    def last_states(self, sequence: Sequence[int], places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states (n, H) that predict the tokens at these places, and the logits (n, V) made of them."""

    def routing(self, sequence: Sequence[int]) -> list[Routed]:
        """Which experts each of its layers takes for the tokens of a sequence, by its own prefill; empty if dense."""

    @property
    def llm(self) -> Any:
        """The ``vllm.LLM``."""

    @property
    def model(self) -> Any:
        """The served module, a torch.nn.Module with vLLM's ``load_weights``."""

    @property
    def hf_config(self) -> Any:
        """The transformers config the served module was built from, overrides included."""


def in_process(engine: Engine | None) -> TypeGuard[InProcessEngine]:
    """Whether the engine's module can be read here."""
    return engine is not None and Capability.READ_MODEL in engine.capabilities
