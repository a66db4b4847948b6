"""Environment first: vLLM, the hub and TRL read it when they are imported."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import support

# of this process alone: two that start at once would both find TRL's first choice free
os.environ["MASTER_PORT"] = str(support.free_port())

# the longest first, so that two processes come to an end together
LONG = (
    "test_engine.py", "test_server.py", "test_check.py", "test_diagnose.py", "test_async.py", "test_trainers.py",
    "test_grpo.py", "test_engine_config.py", "test_pilot.py", "test_baseline.py", "test_report.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
