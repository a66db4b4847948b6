"""The Triton kernels' arithmetic, in Triton's interpreter on the CPU: their speed needs a GPU.

Run by test_head_triton.py, in a process that has TRITON_INTERPRET=1 from the start.
"""

import pytest
import torch
from test_head import DTYPES, error, make, oracle

from trl_parity.head import Head, score_tokens


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("hidden_dtype", DTYPES)
def test_every_pair_of_dtypes_is_the_fp32_head(hidden_dtype, weight_dtype):
    hidden, targets, head = make(37, 48, 131)
    args = hidden.to(hidden_dtype), targets, Head(weight=head.weight.to(weight_dtype))
    assert error(*args, backend="triton") < 3e-6 * 3
    assert error(*args, backend="triton") < 3 * error(*args, backend="torch") + 1e-6


@pytest.mark.parametrize(("count", "width", "vocab"), [(1, 1, 1), (1, 16, 2), (16, 5, 32), (33, 40, 133)])
def test_shapes_that_fill_no_tile(count, width, vocab):
    assert error(*make(count, width, vocab, dtype=torch.bfloat16), backend="triton") < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"softcap": 5.0, "logit_scale": 2.0},
        {"logit_scale": 0.25, "temperature": 1.7},
        {"bias": torch.linspace(-2, 2, 90)},
        {"vocab_size": 71},
        {"vocab_size": 71, "softcap": 30.0, "bias": torch.linspace(-2, 2, 90), "temperature": 0.7},
    ],
)
def test_every_setting_of_the_head(settings):
    assert error(*make(29, 24, 90, **settings), backend="triton") < 1e-5


def test_slices_of_the_tokens_give_the_same():
    args = make(100, 16, 70, dtype=torch.bfloat16)
    whole, sliced = (score_tokens(*args, backend="triton", chunk_bytes=b) for b in (64 << 20, 16 * 4 * 10))
    for a, b in zip(whole, sliced, strict=True):
        assert torch.equal(a, b)


def test_large_logits_lose_no_digits():
    """An fp32 master weight's three terms: logits near 60, where the head in bf16 is off by 0.1."""
    hidden, targets, head = make(32, 64, 150, std=20.0)
    assert error(hidden, targets, head, backend="triton") < 3e-5
    rounded = Head(weight=head.weight.bfloat16())
    got = score_tokens(hidden.bfloat16(), targets, rounded, backend="triton").logprobs
    assert (got - oracle(hidden, targets, head)[0]).abs().max() > 0.01  # what the terms are for


def test_a_token_taken_out_by_the_bias_and_a_token_that_is_not_finite():
    hidden, targets, head = make(20, 16, 70)
    bias = torch.zeros(70)
    bias[32:64] = -torch.inf  # a whole tile
    targets = torch.where((targets >= 32) & (targets < 64), 3, targets)
    head = Head(weight=head.weight, bias=bias)
    assert error(hidden, targets, head, backend="triton") < 1e-5
    hidden[4, 2] = torch.nan
    scores = score_tokens(hidden, targets, head, backend="triton")
    for x in scores:
        assert not torch.isfinite(x[4])
        assert torch.isfinite(x[[i for i in range(20) if i != 4]]).all()


def test_logits_rounded_as_a_half_precision_head_does():
    hidden, targets, head = make(40, 32, 80, dtype=torch.bfloat16)
    head = Head(weight=head.weight, logits_dtype=torch.bfloat16, temperature=0.8)
    got, want = (score_tokens(hidden, targets, head, backend=b) for b in ("triton", "torch"))
    close = (got.logprobs - want.logprobs).abs() < 1e-5
    assert close.float().mean() > 0.9  # a logit between two bf16 numbers may be rounded either way
    assert (got.logprobs - want.logprobs).abs().max() < 0.1


def test_what_it_does_not_take_is_said():
    hidden, targets, head = make(3, 16, 20)
    low_rank = Head(weight=head.weight, low_rank=((torch.ones(2, 16), torch.ones(20, 2), 0.5),))
    with pytest.raises(ValueError, match="no low-rank head"):
        score_tokens(hidden, targets, low_rank, backend="triton")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        score_tokens(hidden, targets, head, backend="cuda")
