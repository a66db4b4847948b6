"""The only code that touches TRL's internals: from a trainer to a RolloutBatch."""

from .instrumentation import Capture, Observer, instrument, uninstrument

__all__ = ["Capture", "Observer", "instrument", "uninstrument"]
