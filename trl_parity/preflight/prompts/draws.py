"""How hypothesis draws for trl-parity: from the seed alone. Apart, because it derives from a class of hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis.internal.conjecture.providers import HypothesisProvider

__all__ = ["PlainDraws"]


class PlainDraws(HypothesisProvider):
    """Uniform integers, and no constants.

    Hypothesis itself leans towards small integers and towards constants in the source of whatever modules happen to be
    loaded: good at finding bugs in one's own code, but then one seed gives other prompts in another process, and most
    of a vocabulary is hardly ever seen.
    """

    def _maybe_draw_constant(self, *args: Any, **kwargs: Any) -> None:
        return None

    def draw_integer(
        self,
        min_value: int | None = None,
        max_value: int | None = None,
        *,
        weights: Any = None,
        shrink_towards: int = 0,
    ) -> int:
        """Uniform between bounds."""
        if min_value is None or max_value is None or weights is not None:
            return super().draw_integer(min_value, max_value, weights=weights, shrink_towards=shrink_towards)
        assert self._random is not None
        return self._random.randint(min_value, max_value)
