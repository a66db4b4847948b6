"""What tests share. Environment first: vLLM, the hub, W&B and TRL read it when they are imported."""

import os
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent

sys.path.insert(0, str(ROOT / "recipes" / "drill"))

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model only waits for a second thread
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trl-parity-trackio-"))  # read when it is imported
