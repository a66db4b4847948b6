"""A reference data set on disk: made, read, refused."""

from .baseline import Baseline, open_baseline

__all__ = ["Baseline", "open_baseline"]
