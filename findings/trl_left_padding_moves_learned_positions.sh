#!/usr/bin/env bash
# TRL 1.16.0, transformers 5.17.0: GRPO's log-probs of a completion depend on how long the other prompts of its batch are
# where a model learns its positions: TRL pads prompts on the left and passes no position_ids, and GPT-2 and BioGPT count
# from the padding on (2.6 and 6.7 nats here, random weights). OPT, which counts over the mask, and Llama agree to 1e-5.
# No message is printed. Who hits it: GRPO on such a model beside an engine, which counts every request from 0.
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
HIDDEN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
CONFIGS = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.3, **HIDDEN},
    "biogpt": {"intermediate_size": 128, "initializer_range": 0.3, **HIDDEN},
    "llama": {"intermediate_size": 128, "num_key_value_heads": 2, "initializer_range": 0.3, **HIDDEN},
}


def gap(name, options):
    """Of one completion's log-probs as GRPO scores them: its prompt as long as the batch's longest, or 9 shorter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=64, pad_token_id=0, eos_token_id=1, bos_token_id=1, **options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_config(config).float(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=2, num_generations=2, use_cpu=True, bf16=False,
                report_to="none",
            ),
            train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 4),
            processing_class=tokenizer,
        )
    ids = torch.arange(20)[None] % 40 + 5  # a prompt of 12 tokens and a completion of 8
    real, pad = torch.ones_like(ids), torch.zeros(1, 9, dtype=torch.long)
    model = trainer.model.eval()
    with torch.no_grad():
        alone, padded = (
            trainer._get_per_token_logps_and_entropies(model, i, mask, 8)[0]
            for i, mask in ((ids, real), (torch.cat([pad, ids], 1), torch.cat([pad, real], 1)))
        )
    return float((alone - padded).abs().max())


print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
found = {name: gap(name, options) for name, options in CONFIGS.items()}
for name, size in found.items():
    print(f"{name}: the same completion beside a prompt 9 tokens longer: largest difference {size:.1e} nats")
moved = {name for name, size in found.items() if size > 0.1}
sys.exit(0 if moved == {"gpt2", "biogpt"} and all(found[name] < 1e-3 for name in found.keys() - moved) else 1)
PY
