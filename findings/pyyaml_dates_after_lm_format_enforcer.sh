#!/usr/bin/env bash
# Importing lm-format-enforcer 0.11.3, one of vLLM's backends for structured outputs, changes PyYAML 6.0.3 for the
# whole process: `yaml.safe_load` reads a date as text from then on, for every library that shares the process, and a
# date that does not exist is no error any more. The package's copy of a code generator's base class assigns into
# `SafeLoader.yaml_constructors`, a dictionary that all loaders of PyYAML share.
# Who hits it: a trainer with a colocated engine whose settings are read after the first structured request. What a
# file of settings says then depends on what was sampled before. Where it matters, read dates with a loader that has
# constructors of its own, or as text throughout.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3.11}" -m venv "$dir/env"
"$dir/env/bin/pip" install -q pyyaml==6.0.3 lm-format-enforcer==0.11.3
"$dir/env/bin/python" - <<'PY'
import importlib.metadata as metadata
import sys

import yaml

TEXT = "started: 2024-01-31"

print("pyyaml", metadata.version("pyyaml"), "lm-format-enforcer", metadata.version("lm-format-enforcer"))
before = yaml.safe_load(TEXT)["started"]
print(f"before the import: {before!r}")
import lmformatenforcer  # noqa: E402, F401

after = yaml.safe_load(TEXT)["started"]
print(f"after the import:  {after!r}")
sys.exit(0 if type(before).__name__ == "date" and after == "2024-01-31" else 1)
PY
