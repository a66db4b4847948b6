"""Does the callback work with other TRLs? Installs each beside the present stack and runs real GRPO and RLOO on it.

    python benchmarks/trl_range.py --versions 1.0.0 1.6.0 1.16.0
    .venv-ppo/bin/python benchmarks/trl_range.py --versions 1.12.0    # which does not import beside vLLM 0.31

A clean run, a lost weight sync, a wrong temperature and hidden truncation, detected and named. About two minutes each.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = "clean_run or lost_weight or rloo_asks or (whatever and rloo)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=["1.0.0", "1.6.0", "1.16.0"])
    failed = False
    for version in parser.parse_args().versions:
        with tempfile.TemporaryDirectory() as target:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, f"trl=={version}"]
            subprocess.run(pip, check=True)
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "tests/engine/test_grpo.py",
                "tests/engine/test_trainers.py",
                "-k",
                TESTS,
            ]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([target, str(ROOT)])}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        words = re.findall(r"^(?:\d+ (?:passed|failed|error)|FAILED|ERROR).*$", done.stdout, re.MULTILINE)
        print(f"trl {version}: " + ("; ".join(words) or done.stdout[-500:] + done.stderr[-500:]), flush=True)
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
