"""The only code that touches TRL's internals: from a trainer to a RolloutBatch."""

from .capture import Capture
from .instrumentation import Observer, instrument, uninstrument

__all__ = ["Capture", "Observer", "instrument", "uninstrument"]
