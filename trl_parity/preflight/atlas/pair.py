"""One architecture: a tiny random checkpoint, loaded by transformers and by vLLM, in fp32, on the same tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from ...engine.offline import BenchEngine, build_engine
from ...engine.weight_readback import policy_tensors
from ...records import SamplingSettings
from .tiny import VOCABULARY, tiny_models

__all__ = ["AGREE", "compare"]

AGREE = 1e-4  # nats, at most, at any entry of a law: fp32 sums in another order

_PROMPTS, _LENGTH, _ANSWER = 2, 64, 16  # past a window of 16 and four blocks of the KV cache

_ENGINE = {
    "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 128, "seed": 0,
    "gpu_memory_utilization": 0.1, "enable_prefix_caching": False, "max_num_seqs": 8,
}  # fmt: skip


def compare(kind: type, config_kind: type) -> dict[str, Any]:
    """What becomes of a class: ``outcome``, ``why``, and its deviations in ``prefill``, ``decode`` and ``sync``.

    A deviation: ``mean`` and ``max`` |Δ log-prob| over positions and vocabulary, nats, and ``first``, the position of
    the first law that differs by over ``AGREE``. ``sync``: by prefill, after other weights were delivered as TRL
    delivers them.
    """
    model, why = None, ""
    ids = torch.randint(3, VOCABULARY, (_PROMPTS, _LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    for found in tiny_models(kind, config_kind):
        try:
            if isinstance(found, Exception):
                raise found
            ids = torch.randint(
                3, VOCABULARY, (_PROMPTS, _LENGTH), generator=torch.Generator().manual_seed(0)
            ).tolist()
            laws = _laws(found, ids)
            model = found
            break
        except Exception as e:
            why = _words(e)
    if model is None:
        return {"outcome": "no tiny model", "why": why}
    with tempfile.TemporaryDirectory(prefix="trl-parity-atlas-") as folder:
        try:
            model.save_pretrained(folder)
            engine = build_engine(folder, _ENGINE)
        except Exception as e:
            return {"outcome": "not loaded", "why": _words(e.__cause__ or e)}
        try:
            row = _deviations(engine, model, ids, laws)
        except Exception as e:
            return {"outcome": "not run", "why": _words(e)}
        finally:
            engine.close()
    apart = [name for name in ("prefill", "decode", "sync") if row.get(name, {}).get("max", 0.0) > AGREE]
    return row | {"outcome": "deviates" if apart else "agrees" if "sync" in row else "not synced"}


def _deviations(
    engine: BenchEngine, model: Any, ids: Sequence[Sequence[int]], laws: Sequence[torch.Tensor]
) -> dict[str, Any]:
    row: dict[str, Any] = {"prefill": _apart(engine.prefill_laws(ids), [law[:-1] for law in laws])}
    contexts = [row[: _LENGTH - _ANSWER] for row in ids]
    settings = SamplingSettings(temperature=1.0)
    sampled = engine.sample(contexts, settings, max_tokens=_ANSWER, seeds=[0] * len(ids), whole=True)
    whole = [[*context, *one.token_ids] for context, one in zip(contexts, sampled, strict=True)]
    answers = [law[_LENGTH - _ANSWER - 1 : -1] for law in _laws(model, whole)]
    row["decode"] = _apart([one.laws for one in sampled if one.laws is not None], answers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * p.std(correction=0) * torch.randn(p.shape, generator=generator))
    try:
        engine.load((t.name, t.tensor) for t in policy_tensors(model))
        engine.forget()
    except Exception as e:
        return row | {"why": f"weights can't be delivered: {_words(e)}"}
    row["sync"] = _apart(engine.prefill_laws(ids), [law[:-1] for law in _laws(model, ids)])
    return row


def _laws(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """(T, V) fp32 log-probs after each token, of the model's own logits, a row at a time: no padding."""
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row])).logits[0, :, :VOCABULARY].float() for row in rows]
    laws = [one.log_softmax(-1) for one in logits]
    if not all(bool(law.isfinite().all()) for law in laws):
        raise ValueError("the model's own log-probs are not finite")
    return laws


def _apart(engine: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> dict[str, float | int | None]:
    gaps = torch.stack([(a[:, :VOCABULARY] - b).abs() for a, b in zip(engine, ours, strict=True)])  # (B, T, V)
    wide = (gaps.amax((0, 2)) > AGREE).nonzero().flatten().tolist()
    return {"mean": float(gaps.mean()), "max": float(gaps.max()), "first": wide[0] if wide else None}


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
