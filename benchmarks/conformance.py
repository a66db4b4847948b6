"""Does the callback recompute a model's law? Every causal language model of transformers that can be built tiny.

    python benchmarks/conformance.py                       # all of them, a few minutes
    python benchmarks/conformance.py --only gemma2 granite --json conformance.json

Each is random, in fp32 and eval mode, on two rows of 12 tokens, the second padded on the left, temperature 0.7. Its
log-probs of the last 6 tokens are had in three ways: by the callback's scorer, by TRL's own loss (its fused head), and
from the logits of the model's own forward pass, which is what an engine serves. All three should be one law.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trl_parity.preflight.atlas.tiny import VOCABULARY, classes, tiny_models  # noqa: E402

T, KEEP, TEMPERATURE = 12, 6, 0.7

SAME = 1e-4  # nats: fp32 sums in another order


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
    for model in tiny_models(kind, config_kind):
        if isinstance(model, Exception):
            row |= {"outcome": "not built", "why": f"{type(model).__name__}: {model}".splitlines()[0][:200]}
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
    rows = []
    for name, kind, config_kind in classes():
        if not options.only or name in options.only:
            rows.append(row_of(name, kind, config_kind))
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
