"""The Triton kernels' arithmetic, in Triton's interpreter on the CPU: their speed needs a GPU.

Run by test_head_triton.py, in a process that has TRITON_INTERPRET=1 from the start.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, given, settings
from support.head import DTYPES, error, make, oracle

from trl_parity.records import SamplingSettings
from trl_parity.scoring import head_triton
from trl_parity.scoring.head import score_tokens
from trl_parity.scoring.head_spec import Head
from trl_parity.scoring.sampling import replay, replay_top


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


def with_top(hidden, targets, head, most, **how):
    top = torch.full((len(hidden), most), torch.nan)
    return score_tokens(hidden, targets, head, backend="triton", top=top, **how), top


@pytest.fixture
def left_to_torch(monkeypatch):
    """How many tokens the kernels could not find the most likely ones of."""
    found, inner = [], head_triton.score_tokens_triton

    def counting(*args):
        scores = inner(*args)
        found.append(int(scores[2].sum()))
        return scores

    monkeypatch.setattr(head_triton, "score_tokens_triton", counting)
    return found


@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    st.integers(1, 40), st.integers(1, 4), st.integers(161, 400), st.sampled_from([0.7, 1.0, 1.6]),
    st.sampled_from(DTYPES), st.sampled_from([1 << 26, 1]),
)  # fmt: skip
def test_the_most_likely_tokens(count, most, vocab, temperature, dtype, chunk_bytes):
    """M of them are the naive sort's; the target's number is the same in both; scores are those without."""
    hidden, _, head = make(count, 24, vocab, dtype=dtype, temperature=temperature)
    z = hidden.double() @ head.weight.double().T / temperature
    exact = z.log_softmax(-1).topk(most)
    most_likely = head_triton.most_likely(hidden, head)
    assert most_likely == 4 * -(-vocab // 32) // 5 >= 4
    targets = exact.indices[:, -1]
    scores, top = with_top(hidden, targets, head, most, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(top.double(), exact.values, atol=2e-5, rtol=0)
    assert torch.equal(scores.logprobs, top.gather(1, (top == scores.logprobs[:, None]).int().argmax(1, True))[:, 0])
    plain = score_tokens(hidden, targets, head, backend="triton")
    for a, b in zip(scores, plain, strict=True):
        assert torch.equal(a, b)


def test_most_tokens_are_found_by_the_kernels(left_to_torch):
    hidden, targets, head = make(64, 24, 32 * 30, dtype=torch.bfloat16)
    for most in (1, 8, 24):
        with_top(hidden, targets, head, most)
    assert left_to_torch[:2] == [0, 0]
    assert left_to_torch[2] < 64  # of 30 tiles the 24 best maxima: a low floor
    assert torch.isnan(with_top(*make(5, 8, 64), 2)[1]).sum() == 0  # more than two tiles give: torch's
    assert len(left_to_torch) == 3


def test_equals_and_tokens_taken_out_are_left_to_torch(left_to_torch):
    hidden, targets, head = make(6, 16, 320)
    weight = head.weight.clone()
    weight[1:200] = weight[0]  # so many equals reach any floor there
    hidden[:3] = weight[0]
    bias = torch.zeros(320)
    bias[40:] = -torch.inf  # all but two tiles
    hidden[5, 0] = torch.nan
    targets %= 40
    for ties, rows in (True, [0, 1, 2, 5]), (False, list(range(6))):
        head = Head(weight=weight, bias=None if ties else bias)
        scores, top = with_top(hidden, targets, head, 4)
        expected = torch.empty(len(rows), 4)
        torchs = score_tokens(hidden[rows], targets[rows], head, backend="torch", top=expected)
        for got, want in zip((*scores, top), (*torchs, expected), strict=True):
            torch.testing.assert_close(got[rows], want, atol=0, rtol=0, equal_nan=True)
        assert left_to_torch.pop() == len(rows)
        assert not torch.isfinite(top[5]).any()
        assert torch.isfinite(top[:5]).all()


@pytest.fixture(scope="module")
def sampled():
    """Logits and targets, ten of them random, with the kernels' scores and most likely tokens."""
    hidden, targets, head = make(50, 24, 32 * 40, dtype=torch.bfloat16, temperature=0.7)
    logits = hidden.float() @ head.weight.float().T
    targets = torch.where(torch.arange(50) < 40, (logits / 0.7).softmax(-1).multinomial(1)[:, 0], targets)
    return logits, targets, *with_top(hidden, targets, head, 32)


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.05}, {"top_k": 7, "top_p": 0.8}])
def test_what_truncation_keeps_is_read_from_them(sampled, sampling):
    logits, targets, scores, top = sampled
    sampling = SamplingSettings(temperature=0.7, **sampling)
    got, known = replay_top(top, scores.logprobs, sampling, 32 * 40)
    want = replay(logits, targets, sampling, 0.7)
    assert known.float().mean() > 0.5
    assert want.out_of_support[known].any()
    assert not want.out_of_support[known].all()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[known], b[known], atol=1e-4, rtol=0)


def test_what_it_does_not_take_is_said():
    hidden, targets, head = make(3, 16, 20)
    low_rank = Head(weight=head.weight, low_rank=((torch.ones(2, 16), torch.ones(20, 2), 0.5),))
    with pytest.raises(ValueError, match="no low-rank head"):
        score_tokens(hidden, targets, low_rank, backend="triton")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        score_tokens(hidden, targets, head, backend="cuda")
