"""Probes: each undoes one cause, as if it were the only difference, and says what it saw.

A probe takes the batch, the counterfactual explained so far and what earlier probes found, and returns the
``Candidate`` in which its cause is undone (or None: looked, found nothing to undo) with what it found for later ones.
It knows mechanisms, never the run's history. What it can't ask raises ``NotPossible``.
"""

from __future__ import annotations

from .base import COSTS, FREE, Candidate, NotPossible, Probe, in_order, recomputed
from .cache_precision import CACHE
from .engine_head import ENGINE_HEAD
from .handoff import HANDOFF
from .rescore import RESCORE
from .routing import ROUTING
from .sampling_params import SAMPLING_PARAMS
from .some_requests import SOME_REQUESTS
from .trainer_forward import TRAINER_FORWARD
from .weight_sync import WEIGHT_SYNC

__all__ = ["COSTS", "FREE", "PROBES", "Candidate", "NotPossible", "Probe", "in_order", "recomputed"]

PROBES = in_order((
    *HANDOFF, *TRAINER_FORWARD, *CACHE, *SAMPLING_PARAMS, *SOME_REQUESTS, *WEIGHT_SYNC, *ENGINE_HEAD, *RESCORE,
    *ROUTING,
))  # fmt: skip
