"""Counterfactuals: each probe undoes one cause, as if it were the only difference, and says what it saw.

A probe takes the scene and the world explained so far, and returns the ``Candidate`` in which its cause is undone
(or None: looked, found nothing to undo). It knows mechanisms, never the run's history. What it can't ask raises
``NotPossible``.
"""

from __future__ import annotations

from .base import COSTS, FREE, Candidate, NotPossible, Probe, redone
from .handoff import ARRIVED
from .rescore import LADDER
from .sampling_params import LAWS
from .trainer_forward import PASSES
from .weight_sync import WEIGHTS

__all__ = ["COSTS", "FREE", "PROBES", "Candidate", "NotPossible", "Probe", "redone"]

PROBES: tuple[Probe, ...] = (*ARRIVED, *PASSES, *LAWS, *WEIGHTS, *LADDER)
