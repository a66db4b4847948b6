"""Environment first: vLLM and the hub read it when they are imported."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import support  # noqa: F401
