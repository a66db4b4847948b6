"""Engine arguments that vLLM once took: since when they are gone, what stands in their place, and where it says so."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RETIRED", "Retired"]


@dataclass(frozen=True, slots=True)
class Retired:
    """An argument that is gone. ``pull``: number of vLLM's pull request that took it out, or that says why."""

    since: str
    instead: str
    pull: int


RETIRED: dict[str, Retired] = {}
