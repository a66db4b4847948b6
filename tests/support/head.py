"""The language-model head in fp64, and how far the package's is from it."""

import torch

from trl_parity.scoring.head import score_tokens
from trl_parity.scoring.head_spec import Head

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def oracle_logits(hidden, head):
    """fp64 logits before the temperature, from the given (already rounded) tensors."""
    weight = head.weight.double()
    for a, b, scaling in head.low_rank:
        weight = weight + scaling * b.double() @ a.double()
    z = hidden.double() @ weight.T
    if head.bias is not None:
        z = z + head.bias.double()
    z = z[:, : head.vocab_size] * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def oracle(hidden, targets, head):
    logp = torch.log_softmax(oracle_logits(hidden, head) / head.temperature, -1)
    entropy = -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def make(count, width, vocab, *, std=3.0, dtype=torch.float32, seed=0, **kwargs):
    """Random hidden states, targets and head; logits have about this standard deviation before the scale."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=g).to(dtype)
    weight = (torch.randn(vocab, width, generator=g) * std / width**0.5).to(dtype)
    targets = torch.randint(0, kwargs.get("vocab_size") or vocab, (count,), generator=g)
    return hidden, targets, Head(weight=weight, **kwargs)


def error(hidden, targets, head, **kwargs):
    scores = score_tokens(hidden, targets, head, **kwargs)
    expected = oracle(hidden, targets, head)
    for got, want in zip(scores, expected, strict=True):
        assert got.dtype == torch.float32
        assert got.shape == want.shape
        assert not got.requires_grad
    gaps = [(got - want).abs() for got, want in zip(scores, expected, strict=True)]
    return max((gap.max().item() for gap in gaps if gap.numel()), default=0.0)
