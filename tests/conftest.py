"""Environment first: importing ``support`` sets what vLLM, the hub and TRL read when they are imported."""

import os

import pytest

pytest.register_assert_rewrite("support")

from support.models import save_tiny_model  # noqa: E402
from support.processes import free_port  # noqa: E402

# of this process alone: two that start at once would both find TRL's first choice free
os.environ["MASTER_PORT"] = str(free_port())

# the longest first, so that two processes come to an end together
LONG = (
    "test_head_triton.py", "test_processes.py", "test_server.py", "test_check.py", "test_diagnose.py", "test_async.py",
    "test_trainers.py", "test_grpo.py", "test_engine_args.py", "test_pilot_run.py", "test_baseline.py",
    "test_report.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """The tiny Qwen3 as saved; nobody writes there."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_dir):
    """The same, loaded in fp32; nobody leaves it changed."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
