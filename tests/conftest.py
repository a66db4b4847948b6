"""Environment first: vLLM, the hub and TRL read it when they are imported."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import support

# of this process alone: two that start at once would both find TRL's first choice free
os.environ["MASTER_PORT"] = str(support.free_port())
