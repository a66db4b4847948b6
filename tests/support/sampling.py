"""What vLLM's own sampler does."""

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
