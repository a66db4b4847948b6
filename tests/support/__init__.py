"""What tests share. Environment first: vLLM, the hub, W&B and TRL read it when they are imported."""

import os
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
PATH = os.pathsep.join([str(TESTS), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # of children

sys.path.insert(0, str(ROOT / "recipes" / "drill"))

# Compiled Python is kept between tests and runs, also where nothing may be written beside the sources: each process
# that a test starts would else compile torch, transformers, TRL and vLLM anew.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(ROOT / ".cache" / "pycache")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model only waits for a second thread
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # compiling an engine takes ten times as long as building it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trl-parity-trackio-"))  # read when it is imported
