#!/usr/bin/env bash
# peft 0.21.2, transformers 5.17.0: with tied embeddings, an adapter on the embedding computes another function once it is
# merged, and ensure_weight_tying=True, the option meant for tied models, makes the difference larger: .039 nats without,
# .058 with it, on this model. Merging writes into the one matrix that both the embedding and the head use; with the
# option on, the embedding's adapter and the head's (the same, tied) are both added to it. Unmerging gives the first function back.
# Who hits it: TRL trains the unmerged model and sends the merged one to vLLM, so that the engine samples from another
# policy than the one that learns, from the first step on.
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

ids = torch.arange(24).view(1, 24) % 60 + 3


@torch.no_grad()
def gap(tied_adapter, tied_model=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=tied_model,
    )
    lora = peft.LoraConfig(
        r=8, lora_alpha=8, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=tied_adapter
    )
    model = peft.get_peft_model(LlamaForCausalLM(config).eval(), lora).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.normal_(0, 0.02)
    before = model(ids).logits.log_softmax(-1)
    model.merge_adapter()
    return float((model(ids).logits.log_softmax(-1) - before).abs().max())


print("peft", peft.__version__, "torch", torch.__version__)
untied, plain, tied = gap(False, tied_model=False), gap(False), gap(True)
print(f"largest |merged - adapted| in nats: untied model {untied:.1e}, tied {plain:.3f}, ensure_weight_tying {tied:.3f}")
sys.exit(0 if untied < 1e-5 and plain > 1e-2 and tied > plain else 1)
PY
