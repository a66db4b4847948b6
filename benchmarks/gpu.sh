#!/usr/bin/env bash
# Everything that only a GPU can show, in ten minutes at most on one H100 or H200: the CUDA tests, the head beside its peers
# at a vocabulary of 151,936, what the parts cost against tokens, how often the host waits for the device. No network.
#
#     bash benchmarks/gpu.sh [FOLDER]            # output in FOLDER/gpu.txt and *.json (default: build/gpu)
#     PYTHON=.venv/bin/python PEERS=~/peers/bin/python bash benchmarks/gpu.sh
#
# PEERS: an interpreter with liger-kernel and cut-cross-entropy (benchmarks/head.py). A part that fails or takes longer than
# its share is told, and the others go on; the exit code is how many did.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${1:-build/gpu}
mkdir -p "$out"
exec > >(tee "$out/gpu.txt") 2>&1
failed=0
part() {
  local seconds=$1
  shift
  echo "== $*"
  timeout "$seconds" "$@" || { echo "== failed or too long ($?): $*"; failed=$((failed + 1)); }
}
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
peers=()
[ -n "${PEERS:-}" ] && peers=(--peer-python "$PEERS")
part 150 "$python" -m pytest -q -p no:cacheprovider tests/unit/scoring/test_cuda.py
part 60 "$python" benchmarks/syncs.py --json "$out/syncs.json"
part 150 "$python" benchmarks/head.py --device cuda --tokens 4096 --vocab 151936 --hidden 4096 "${peers[@]}" --json "$out/head_4k.json"
part 150 "$python" benchmarks/head.py --device cuda --tokens 32768 --vocab 151936 --hidden 4096 "${peers[@]}" --json "$out/head_32k.json"
part 90 "$python" benchmarks/scaling.py --device cuda --only measure window --json "$out/scaling.json"
echo "== parts that failed: $failed"
exit "$failed"
