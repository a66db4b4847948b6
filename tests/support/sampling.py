"""What vLLM's own sampler does, and what it should do by its rules."""

import math

import torch


def vllm_kept(logits, sampling):
    """vLLM's min-p, then its top-k and top-p, on logits already divided by the temperature."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    logits = logits.clone()
    if sampling.min_p > 0:
        from types import SimpleNamespace

        from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor

        state = SimpleNamespace(min_p_count=1, min_p=torch.full((len(logits), 1), sampling.min_p))
        logits = MinPLogitsProcessor.apply(state, logits)
    k = torch.full((len(logits),), sampling.top_k) if sampling.top_k > 0 else None
    p = torch.full((len(logits),), sampling.top_p) if sampling.top_p < 1 else None
    return apply_top_k_top_p_pytorch(logits, k, p) > -torch.inf


def naive_kept(row, top_k, top_p, min_p):
    """min-p of the whole law, then top-k, then top-p of what is left; indices that stay."""
    total = math.fsum(math.exp(z) for z in row)
    probs = [math.exp(z) / total for z in row]
    kept = [i for i, p in enumerate(probs) if p >= min_p * max(probs)]
    if 0 < top_k < len(row):
        least = sorted((row[i] for i in kept), reverse=True)[:top_k][-1]
        kept = [i for i in kept if row[i] >= least]
    if top_p < 1:
        rest = math.fsum(math.exp(row[i]) for i in kept)
        order, mass = sorted(kept, key=lambda i: row[i]), 0.0
        for i in order[:-1]:
            mass += math.exp(row[i]) / rest
            if mass > 1 - top_p:
                break
            kept.remove(i)
    return kept
