"""Real GRPO runs for the benchmarks, made the way the drills make theirs (recipes/drill/stack.py)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "drill"))
from stack import CACHE, ROOT, make_trainer, quiet, shared_engine, tiny, versions

__all__ = ["CACHE", "ROOT", "make_trainer", "quiet", "shared_engine", "tiny", "versions"]
