"""The only code that touches TRL's internals: from a trainer to a RolloutBatch."""

from .capture import Capture, MeasurementSettings
from .instrumentation import Observer, instrument, uninstrument

__all__ = ["Capture", "MeasurementSettings", "Observer", "instrument", "uninstrument"]
