"""Does the callback recompute a model's law? Every causal language model of transformers that can be built tiny.

    python benchmarks/conformance.py                       # all of them, a few minutes
    python benchmarks/conformance.py --only gemma2 granite --json conformance.json

Each is random, in fp32 and eval mode, on two rows of 12 tokens, the second padded on the left, temperature 0.7. Its
log-probs of the last 6 tokens are had in three ways: by the callback's scorer, by TRL's own loss (its fused head), and
from the logits of the model's own forward pass, which is what an engine serves. All three should be one law.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

T, KEEP, VOCABULARY, TEMPERATURE = 12, 6, 96, 0.7

SAME = 1e-4  # nats: fp32 sums in another order

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1, "ffn_dim": 64, "word_embed_proj_dim": 32, "embedding_size": 32,
    "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "decoder_ffn_dim": 64, "encoder_ffn_dim": 64, "d_model": 32, "state_size": 8, "num_heads": 4, "n_groups": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8, "sliding_window": 8, "tie_word_embeddings": False,
}  # fmt: skip

BASE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip

# what is left as the class has it, one after the other, until it can be built and run
LEFT = (
    (),
    ("head_dim",),
    ("num_key_value_heads",),
    ("head_dim", "num_key_value_heads"),
    tuple(name for name in SMALL if name not in BASE),
    tuple(name for name in SMALL if name not in (*BASE, "num_key_value_heads")),
)


def tiny(kind: type, left: tuple[str, ...]) -> Any:
    """A config of this class made of small numbers, and so that of its text model."""
    default = kind()
    text = default.get_text_config(decoder=True)
    if text is not default:
        return kind(text_config=small(text, left))
    return kind(**small(default, left))


def small(config: Any, left: tuple[str, ...]) -> dict[str, Any]:
    """The numbers of ``SMALL`` that it has under these names, and a layer of each of two kinds where it lists them."""
    found = {}
    for name, value in SMALL.items():
        try:
            old = getattr(config, name, None)
        except Exception:  # one that differs by layer
            continue
        if name not in left and (isinstance(old, int) or (name.endswith("_token_id") and old is None)):
            found[name] = value
    kinds = getattr(config, "layer_types", None)
    mixed = isinstance(kinds, list) and len(set(kinds)) > 1
    return found | ({"layer_types": [*dict.fromkeys(kinds)][:2]} if mixed else {})


def laws(model: Any) -> dict[str, torch.Tensor]:
    """Log-probs (B, KEEP) of the last tokens: by scorer, by TRL's head, and of the model's own logits."""
    from trl.trainer.utils import add_fused_lm_head

    from trl_parity.records import SamplingSettings
    from trl_parity.scoring.scorer import CompletionScorer

    ids = torch.randint(3, VOCABULARY, (2, T), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    own = model(input_ids=ids, attention_mask=mask).logits[:, :, :VOCABULARY].float()
    targets = ids[:, -KEEP:]
    found = {
        "model": (own[:, -KEEP - 1 : -1] / TEMPERATURE).log_softmax(-1).gather(-1, targets[..., None])[..., 0],
    }
    sampling = SamplingSettings(temperature=TEMPERATURE)
    add_fused_lm_head(model, temperature=TEMPERATURE)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-KEEP] = -100
    with CompletionScorer(model, KEEP, temperature=TEMPERATURE, sampling=sampling, replay_sampling=False,
                          chunk_bytes=1 << 24) as scorer:  # fmt: skip
        try:
            output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            found["TRL"] = output.log_probs[:, -KEEP:]
        except Exception as e:
            found["TRL"] = f"{type(e).__name__}: {e}"  # type: ignore[assignment]
            if not scorer.ran:
                model(input_ids=ids, attention_mask=mask)
    found["scorer"] = scorer.scores().logprobs
    return found


def row_of(name: str, kind: type, config_kind: type) -> dict[str, Any]:
    """What became of one class."""
    row: dict[str, Any] = {"model_type": name, "class": kind.__name__}
    for left in LEFT:
        try:
            model = built(kind, tiny(config_kind, left))
        except Exception as e:
            row |= {"outcome": "not built", "why": f"{type(e).__name__}: {e}".splitlines()[0][:200]}
            continue
        try:
            with torch.no_grad():
                found = laws(model)
            break
        except Exception as e:
            row |= {"outcome": "refused", "why": f"{type(e).__name__}: {e}".splitlines()[0][:200]}
    else:
        return row
    row.pop("why", None)
    for other in ("model", "TRL"):
        if isinstance(found[other], torch.Tensor):
            row[other] = float((found["scorer"] - found[other]).abs().max())
        else:
            row |= {"TRL": None, "why": found[other]}
    if row["TRL"] is None:
        row["outcome"] = "TRL fails"
    elif row["TRL"] > SAME:
        row["outcome"] = "not TRL's"
    else:
        row["outcome"] = "one law" if row["model"] <= SAME else "TRL's, not the model's"
    return row


def built(kind: type, config: Any) -> Any:
    """A random model whose layers, and head, matter. Raises ValueError for one that is not small."""
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > 20_000_000:
        raise ValueError(f"{size:,} parameters, whatever is made small here")
    torch.manual_seed(0)
    model = kind(config).float().eval()
    for path, p in model.named_parameters():
        if p.ndim == 2 and "norm" not in path:
            torch.nn.init.normal_(p, std=0.2)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODEL_TYPE")
    parser.add_argument("--json", type=Path, help="keep the rows here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    import transformers
    import trl

    transformers.utils.logging.disable_progress_bar()
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    rows = []
    for config_kind in mapping:
        kind = mapping[config_kind]
        for one in kind if isinstance(kind, tuple | list) else (kind,):
            name = config_kind.model_type
            if inspect.isclass(one) and (not options.only or name in options.only):
                rows.append(row_of(name, one, config_kind))
                print(f"{rows[-1]['outcome']:24} {name}", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    counts = {
        outcome: [r for r in rows if r["outcome"] == outcome] for outcome in dict.fromkeys(r["outcome"] for r in rows)
    }
    print(
        f"transformers {transformers.__version__}, TRL {trl.__version__}, torch {torch.__version__}: "
        f"{len(rows)} classes\n"
    )
    print("| outcome | classes | which |\n|---|---|---|")
    for outcome, some in sorted(counts.items(), key=lambda x: -len(x[1])):
        which = ", ".join(
            f"{r['model_type']}" + (f" ({r['model']:.2g})" if outcome.startswith("TRL's") else "") for r in some
        )
        print(f"| {outcome} | {len(some)} | {which if len(some) < 80 else '...'} |")


if __name__ == "__main__":
    main()
