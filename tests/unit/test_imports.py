"""What the package's pure folders load, and what anything loads that only reads settings, numbers or files."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from importlib import import_module

HEAVY = ("torch", "vllm", "trl", "transformers", "accelerate", "wandb", "trackio", "matplotlib", "hypothesis")


def modules_of(folder: str) -> list[str]:
    package = import_module(f"trl_parity.{folder}")
    return [package.__name__, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))]


def test_metrics_judging_results_report_and_config_load_nothing_heavy():
    names = [name for folder in ("metrics", "judging", "results", "report", "config") for name in modules_of(folder)]
    assert len(names) > 20
    script = (
        "import importlib, json, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]\n"
        "    if loaded:\n"
        "        break\n"
        "print(json.dumps([name, loaded]))\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    name, loaded = json.loads(out.stdout)
    assert not loaded, f"importing {name} loads {loaded}"
