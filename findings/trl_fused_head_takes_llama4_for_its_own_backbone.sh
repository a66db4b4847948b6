#!/usr/bin/env bash
# TRL 1.16.0 can't make one training step of transformers' Llama4ForCausalLM (text alone; Mllama's is alike). The class
# has the base_model_prefix "language_model" and keeps its decoder as "model", so its base_model is the whole model
# itself. TRL's fused head asks base_model for hidden states, gets logits, and SFTTrainer and GRPOTrainer (and others
# that use it: RLOO, DPO, KTO) end in AttributeError, before any step; TRL's guard takes "model" instead of base_model
# before transformers 5 only. lm_head on the decoder's hidden states gives the model's own logits, so the same step
# could be made. Who hits it: whoever trains a text-only Llama 4 with TRL since the fused head (1.15).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3.11}" -m venv "$dir/env"
"$dir/env/bin/pip" install -q uv==0.13.9
# the CPU build of torch: not on PyPI, but a local index may have it
"$dir/env/bin/pip" install -q --no-deps torch==2.13.0+cpu 2>/dev/null ||
  "$dir/env/bin/pip" install -q --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
"$dir/env/bin/uv" pip install -q --python "$dir/env/bin/python" torch==2.13.0+cpu trl==1.16.0 transformers==5.17.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$dir/env/bin/python" -W ignore - <<'PY'
import importlib.metadata as md
import string
import sys
import tempfile

import datasets
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i for i, c in enumerate(string.digits + " +=", 3)}
tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
shape = dict(
    vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=1,
)
BUILT = {
    "LlamaForCausalLM": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
    "Llama4ForCausalLM": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**shape, intermediate_size_mlp=128, num_local_experts=2, attention_chunk_size=64)
    ),
}
common = dict(
    use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1, per_device_train_batch_size=2,
    save_strategy="no", gradient_checkpointing=False,
)
TRAINERS = {
    "SFTTrainer": lambda model, out: SFTTrainer(
        model=model, processing_class=tokenizer, args=SFTConfig(output_dir=out, max_length=32, **common),
        train_dataset=Dataset.from_dict({"text": ["1+1=2", "2+2=4"] * 2}),
    ),
    "GRPOTrainer": lambda model, out: GRPOTrainer(
        model=model, processing_class=tokenizer,
        args=GRPOConfig(output_dir=out, num_generations=2, max_completion_length=8, **common),
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+2="] * 2}),
    ),
}
print(", ".join(f"{name} {md.version(name)}" for name in ("trl", "transformers", "torch")))
ok = True
for name, build in BUILT.items():
    torch.manual_seed(0)
    model = build()
    ids = torch.arange(3, 13)[None]
    hidden = model.model(input_ids=ids).last_hidden_state
    same = torch.allclose(model.lm_head(hidden), model(input_ids=ids).logits, atol=1e-5)
    print(f"{name}: base_model is {'itself' if model.base_model is model else 'its decoder'}; "
          f"lm_head on its decoder's states gives its own logits: {same}")
    ok &= same and (model.base_model is model) == (name == "Llama4ForCausalLM")
    for kind, make in TRAINERS.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as out:
            try:
                make(build(), out).train()
                said = "one step made"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
        print(f"  {kind}: {said}")
        fails = said == "AttributeError: 'CausalLMOutputWithPast' object has no attribute 'last_hidden_state'"
        ok &= fails if name == "Llama4ForCausalLM" else said == "one step made"
sys.exit(0 if ok else 1)
PY
