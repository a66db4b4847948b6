#!/usr/bin/env bash
# peft 0.21.2: merge_adapter() followed by unmerge_adapter() on a bf16 model does not give the base weights back, and what
# is lost adds up while the adapter trains: 0.2 % of the adapted matrices' entries differ after the first pair, 2 % after ten, 21 %
# after a hundred, in this model. TRL 1.16 makes such a pair at every weight sync with vLLM. The "frozen" base drifts, and
# with it the reference policy that GRPO reads by disabling the adapter; nothing in the run's log-probs shows it, since
# trainer and engine drift together. fp32 weights lose far less; keeping a copy of the base loses nothing.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3.11}" -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 transformers==5.17.0 peft==0.21.2
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$dir/env/bin/python" -W ignore - <<'PY'
import sys

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )
).to(torch.bfloat16)
model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
base = {name: p for name, p in model.named_parameters() if "base_layer" in name}
first = {name: p.detach().clone() for name, p in base.items()}
adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
print("peft", peft.__version__, "torch", torch.__version__)
shares, pairs = [], 0
for until in (1, 10, 100):
    while pairs < until:
        with torch.no_grad():  # the adapter trains
            for p in adapters:
                p.add_(torch.randn_like(p), alpha=1e-4)
        model.merge_adapter()
        model.unmerge_adapter()
        pairs += 1
    changed = sum(int((p != first[name]).sum()) for name, p in base.items())
    shares.append(changed / sum(p.numel() for p in base.values()))
    print(f"after {until} pairs: {shares[-1]:.1%} of the base weights under the adapters changed")
sys.exit(0 if 0 < shares[0] < shares[1] < shares[2] and shares[2] > 0.1 else 1)
PY
