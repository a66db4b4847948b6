"""Counterfactuals: each probe undoes one cause, as if it were the only difference, and says what it saw.

A probe takes the scene and the world explained so far, and returns the :class:`Candidate` in which its cause is undone
(or None: looked, found nothing to undo). It knows mechanisms, never the run's history. What it can't ask raises
:class:`NotPossible`.
"""

from __future__ import annotations

from .arrived import ARRIVED
from .base import COSTS, FREE, Candidate, NotPossible, Probe, redone
from .forward import PASSES
from .ladder import LADDER
from .law import LAWS
from .weights import WEIGHTS

__all__ = ["COSTS", "FREE", "PROBES", "Candidate", "NotPossible", "Probe", "redone"]

PROBES: tuple[Probe, ...] = (*ARRIVED, *PASSES, *LAWS, *WEIGHTS, *LADDER)
