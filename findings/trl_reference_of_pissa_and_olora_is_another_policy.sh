#!/usr/bin/env bash
# TRL 1.16.0 with peft 0.21.2: GRPO with beta > 0 and a PEFT config takes the model with its adapter disabled for the
# reference policy. With init_lora_weights="pissa" or "olora" the base matrices are changed when the adapter is
# made, and the disabled model is not the policy that training starts from: the logged kl of the very first step, at
# learning rate 0, is .19 and .17 nats instead of 0. The penalty then pulls towards a model that nobody trained.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3.11}" -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 transformers==5.17.0 trl==1.16.0 peft==0.21.2
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$dir/env/bin/python" -W ignore - <<'PY'
import string
import sys
import tempfile

import peft
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

transformers.logging.set_verbosity_error()
letters = string.ascii_lowercase + string.digits + " +="
vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i for i, c in enumerate(letters, 3)}
tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)


def first_kl(init):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab), pad_token_id=0, eos_token_id=1, bos_token_id=1, hidden_size=64,
            intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # a law that is not flat
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=8, num_generations=4, max_completion_length=16,
                max_steps=1, beta=0.1, learning_rate=0.0, logging_steps=1, use_cpu=True, bf16=False,
                report_to="none", save_strategy="no", disable_tqdm=True, seed=0,
            ),
            train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(8)]),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(
                r=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=init
            ),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return next(float(row["kl"]) for row in trainer.state.log_history if "kl" in row)


print("trl", trl.__version__, "peft", peft.__version__, "transformers", transformers.__version__)
kl = {init: first_kl(init) for init in (True, "pissa", "olora")}
for init, value in kl.items():
    print(f"init_lora_weights={init!r}: kl of the first step at learning rate 0: {value:.2f}")
sys.exit(0 if abs(kl.pop(True)) < 1e-6 and min(kl.values()) > 0.05 else 1)
PY
