#!/usr/bin/env bash
# TRL 1.16.0 computes GRPO's log-probs from the last hidden state and the output matrix, with the scales and caps of the
# configs it knows by name. Models of transformers 5.17.0 that do something else between backbone and logits get a loss
# of another law than model(...).logits: ModernBERT's decoder (a dense layer, an activation and a norm before the
# matrix: .35 nats here), RecurrentGemma (its soft cap is called logits_soft_cap: .34), MPT (which ignores its own
# logit_scale when it computes logits, while TRL applies it: .21). Llama agrees to 5e-7. No message is printed. Who hits it:
# whoever trains one of these, and whoever compares TRL's numbers with an engine that follows the model.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3.11}" -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 transformers==5.17.0 trl==1.16.0
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$dir/env/bin/python" -W ignore - <<'PY'
import string
import sys
import tempfile

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

transformers.logging.set_verbosity_error()
vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i for i, c in enumerate(string.digits + " +=", 3)}
tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def largest_gap(name, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=64, pad_token_id=0, eos_token_id=1, bos_token_id=1, **options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_config(config).float().eval(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=2, num_generations=2, use_cpu=True, bf16=False,
                report_to="none",
            ),
            train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 4),
            processing_class=tokenizer,
        )
    ids = (torch.arange(16).view(1, 16) + 3).repeat(2, 1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        loss_side = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 8)[0]
        logits = trainer.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -9:-1]
    return float((loss_side - logits.log_softmax(-1).gather(-1, ids[:, -8:, None])[..., 0]).abs().max())


gaps = {
    "llama": largest_gap("llama", num_key_value_heads=4, **small),
    "modernbert-decoder": largest_gap(
        "modernbert-decoder", cls_token_id=1, sep_token_id=1, layer_types=["full_attention"] * 2, **small
    ),
    "recurrent_gemma": largest_gap(
        "recurrent_gemma", num_key_value_heads=1, lru_width=64, logits_soft_cap=1.0, **small
    ),
    "mpt": largest_gap("mpt", d_model=64, n_heads=4, n_layers=2, max_seq_len=128, logit_scale=0.5),
}
print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
for name, gap in gaps.items():
    print(f"{name}: largest |TRL's log-prob - the model's own| {gap:.1e} nats")
sys.exit(0 if gaps.pop("llama") < 1e-5 and min(gaps.values()) > 1e-2 else 1)
PY
