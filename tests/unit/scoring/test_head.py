import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.head import DTYPES, error, make, oracle, oracle_logits

from trl_parity.scoring.head import _use_triton, logits_chunk, score_tokens
from trl_parity.scoring.head_spec import Head


@settings(max_examples=80, deadline=None)
@given(
    count=st.sampled_from([0, 1, 2, 7, 17]),
    width=st.sampled_from([1, 3, 16, 40]),
    vocab=st.sampled_from([1, 2, 31, 131]),
    chunk_bytes=st.sampled_from([1, 400, 1999, 20_001, 1 << 20]),
    hidden_dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    logit_scale=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 5.0]),
    padding=st.sampled_from([None, 0, 1, 30]),
    with_bias=st.booleans(),
    adapters=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_scores_match_fp64_oracle_for_any_sizes_chunks_and_settings(
    count, width, vocab, chunk_bytes, hidden_dtype, weight_dtype, temperature, logit_scale, softcap, padding,
    with_bias, adapters, seed,
):  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    used = None if padding is None else max(1, vocab - padding)
    hidden, targets, head = make(
        count, width, vocab, seed=seed, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        vocab_size=used, bias=torch.randn(vocab, generator=g).to(weight_dtype) if with_bias else None,
        low_rank=tuple(
            (torch.randn(2 + i, width, generator=g), torch.randn(vocab, 2 + i, generator=g) / 4, 0.5 + i)
            for i in range(adapters)
        ),
    )  # fmt: skip
    head = Head(**{name: getattr(head, name) for name in head.__slots__} | {"weight": head.weight.to(weight_dtype)})
    hidden = hidden.to(hidden_dtype)
    largest = oracle_logits(hidden, head).abs().max().item() / temperature if count else 0.0
    assert error(hidden, targets, head, chunk_bytes=chunk_bytes) < 1e-6 + 3e-7 * largest  # 1e-5 at 30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow_unit
def test_error_stays_below_1e_5_nats_over_a_full_size_vocabulary(dtype):
    hidden, targets, head = make(16, 256, 151_936, std=6.3, dtype=dtype)
    z = oracle_logits(hidden, head)
    targets[::2] = z.argmax(-1)[::2]  # both likely and unlikely tokens
    assert z.abs().max() > 28
    assert error(hidden, targets, head) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", ["medium", "high"])
def test_reduced_precision_settings_and_autocast_do_not_reach_the_head(dtype, setting):
    g = torch.Generator().manual_seed(1)
    adapter = (torch.randn(64, 256, generator=g) / 16, torch.randn(999, 64, generator=g) / 8, 2.0)
    hidden, targets, head = make(40, 256, 999, std=6, dtype=dtype, low_rank=(adapter,))
    plain = score_tokens(hidden, targets, head)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        with torch.autocast("cpu", torch.bfloat16):
            scores = score_tokens(hidden, targets, head)
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(scores.logprobs, plain.logprobs)
    assert torch.equal(scores.entropy, plain.entropy)


@pytest.mark.parametrize("hidden_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_mixed_dtypes_are_never_rounded_to_the_smaller(hidden_dtype, weight_dtype):
    """Large enough for oneDNN: it keeps small products in fp32 whatever the mode."""
    hidden, targets, head = make(64, 256, 999, std=4)
    head = Head(weight=head.weight.to(weight_dtype))
    assert error(hidden.to(hidden_dtype), targets, head) < 1e-5


def test_default_dtype_does_not_reach_the_head():
    hidden, targets, head = make(40, 64, 300, dtype=torch.bfloat16)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        scores, logits = score_tokens(hidden, targets, head), logits_chunk(hidden, head)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(scores.logprobs, score_tokens(hidden, targets, head).logprobs)
    assert torch.equal(logits, logits_chunk(hidden, head))


def test_precision_settings_come_back_after_an_error_inside():
    hidden, _, head = make(4, 8, 16)
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError):
        logits_chunk(hidden, head, out=torch.zeros(1, 1).expand(4, 16))
    assert torch.get_float32_matmul_precision() == before


def test_logits_chunk_gives_logits_before_temperature():
    for dtype in DTYPES:
        hidden, _, head = make(
            5, 24, 301, dtype=dtype, temperature=0.3, logit_scale=0.5, softcap=4.0, vocab_size=290,
            bias=torch.linspace(-2, 2, 301), low_rank=((torch.ones(1, 24), torch.ones(301, 1), 0.1),),
        )  # fmt: skip
        out = torch.full((5, 290), 7.0)
        assert logits_chunk(hidden, head, out=out) is out
        torch.testing.assert_close(out.double(), oracle_logits(hidden, head), atol=5e-6, rtol=0)
        assert torch.equal(logits_chunk(hidden, head), out)
        assert logits_chunk(hidden[:0], head).shape == (0, 290)


def test_tensors_that_require_grad_and_non_contiguous_hidden():
    hidden, targets, head = make(20, 32, 100)
    expected = score_tokens(hidden, targets, head)
    head.weight.requires_grad_()
    for strange in (
        hidden.t().contiguous().t(),
        torch.stack([hidden, hidden], 1).requires_grad_()[:, 0],
        torch.stack([hidden, hidden], 2)[:, :, 1],
    ):
        assert not strange.is_contiguous()
        assert error(strange, targets, head, chunk_bytes=3000) < 1e-5
        torch.testing.assert_close(score_tokens(strange, targets, head).logprobs, expected.logprobs)
    assert head.weight.grad is None


def test_minus_infinity_bias_takes_tokens_out_without_nan():
    bias = torch.zeros(300)
    bias[:200] = -torch.inf  # with small chunks, whole tiles are -inf before the first finite one
    hidden, targets, head = make(9, 16, 300, bias=bias)
    targets = 200 + targets % 100
    targets[0] = 3
    for chunk_bytes in (500, 5000, 1 << 20):
        scores = score_tokens(hidden, targets, head, chunk_bytes=chunk_bytes)
        expected = oracle(hidden, targets, head)
        assert scores.logprobs[0] == -torch.inf
        torch.testing.assert_close(scores.logprobs.double(), expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(scores.entropy.double(), expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk_bytes", [500, 1 << 20])
def test_a_soft_cap_does_not_lift_what_the_bias_takes_out(chunk_bytes):
    bias = torch.zeros(300)
    bias[:200] = -torch.inf
    hidden, targets, head = make(9, 16, 300, bias=bias, softcap=4.0)
    targets = 200 + targets % 100
    scores = score_tokens(hidden, targets, head, chunk_bytes=chunk_bytes)
    logits = 4.0 * torch.tanh(hidden.double() @ head.weight[200:].double().T / 4.0)
    law = logits.log_softmax(-1)
    torch.testing.assert_close(scores.logprobs.double(), law[range(9), targets - 200], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.entropy.double(), -(law.exp() * law).sum(-1), atol=1e-5, rtol=0)
    assert (logits_chunk(hidden, head)[:, :200] == -torch.inf).all()


class OnChip:
    """Stands for kernels of a GPU, which give these numbers."""

    def __init__(self, monkeypatch, spoil):
        from trl_parity.scoring import head as module

        self.calls, self._spoil = 0, spoil
        monkeypatch.setattr(module, "_use_triton", self._fits)
        monkeypatch.setattr(module, "_score_on_chip", self._score)
        monkeypatch.setattr(module, "_without_triton", set())
        monkeypatch.setattr(module, "_proven", set())
        self._without = module._without_triton

    def _fits(self, hidden, head, backend):
        return backend == "triton" or (backend == "auto" and hidden.device not in self._without)

    def _score(self, hidden, targets, head, chunk_bytes, top):
        self.calls += 1
        scores = score_tokens(hidden, targets, head, chunk_bytes=chunk_bytes, backend="torch", top=top)
        self._spoil(scores, top)
        return scores


SPOILT = {
    "a log-prob": lambda scores, top: scores.logprobs[3].add_(0.01),
    "an entropy": lambda scores, top: scores.entropy.mul_(1.01),
    "no number": lambda scores, top: scores.logprobs[3].fill_(torch.nan),
    "the most likely": lambda scores, top: top[:, 1].sub_(0.01),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_kernel_with_wrong_numbers_is_found_out_and_not_used_again(monkeypatch, caplog, what):
    hidden, targets, head = make(40, 16, 90, std=4.0)
    chip, top, expected_top = OnChip(monkeypatch, SPOILT[what]), torch.empty(40, 3), torch.empty(40, 3)
    expected = score_tokens(hidden, targets, head, backend="torch", top=expected_top)
    for _ in range(3):
        scores = score_tokens(hidden, targets, head, top=top)
        assert torch.equal(scores.logprobs, expected.logprobs)
        assert torch.equal(scores.entropy, expected.entropy)
        assert torch.equal(top, expected_top)
    assert chip.calls == 1
    [told] = [r.message for r in caplog.records if "Triton" in r.message]
    assert "nats from torch's on 40 tokens" in told
    with pytest.raises(RuntimeError, match="nats from torch's"):
        score_tokens(hidden, targets, head, top=top, backend="triton")


def test_a_kernel_is_compared_once_for_each_kind_of_head(monkeypatch, caplog):
    caplog.set_level("INFO")
    chip = OnChip(monkeypatch, lambda scores, top: scores.logprobs.add_(1e-5))
    hidden, targets, head = make(600, 16, 90, bias=torch.full((90,), -torch.inf).index_fill(0, torch.arange(9), 0.0))
    hidden[7] = torch.nan
    for softcap in (None, 2.0, None, 2.0):
        score_tokens(hidden, targets, Head(weight=head.weight, bias=head.bias, softcap=softcap))
    assert chip.calls == 4
    told = [r.message for r in caplog.records]
    assert len(told) == 2
    assert all("gives torch's numbers on 256 tokens" in text for text in told)


@pytest.mark.parametrize("chunk_bytes", [300, 1 << 20])
def test_extreme_logits_keep_entropy_exact(chunk_bytes):
    """Thousands of nats from zero; a common offset cancels, and entropy must not lose digits to it."""
    hidden, targets, head = make(6, 8, 64, std=0.5)
    expected = oracle(hidden, targets, head)
    for offset in (-4096.0, 4096.0):  # fp32 spacing there is 2^-11, so the logits themselves are that coarse
        scores = score_tokens(
            hidden, targets, Head(weight=head.weight, bias=torch.full((64,), offset)), chunk_bytes=chunk_bytes
        )
        torch.testing.assert_close(scores.logprobs.double(), expected[0], atol=2**-11, rtol=0)
        torch.testing.assert_close(scores.entropy.double(), expected[1], atol=2**-11, rtol=0)
    certain = score_tokens(hidden * 1e6, targets, head, chunk_bytes=chunk_bytes)
    assert certain.entropy.abs().max() < 1e-30
    assert torch.isfinite(certain.logprobs).all()


def test_uniform_distribution_has_log_v_entropy_and_one_row_has_none():
    zero = torch.zeros(3, 4)
    scores = score_tokens(zero, torch.tensor([0, 500, 999]), Head(weight=torch.ones(1000, 4)), chunk_bytes=777)
    torch.testing.assert_close(scores.entropy, torch.full((3,), 1000.0).log())
    torch.testing.assert_close(scores.logprobs, -torch.full((3,), 1000.0).log())
    single = score_tokens(zero, torch.zeros(3, dtype=torch.int64), Head(weight=torch.ones(1, 4)))
    assert single.logprobs.tolist() == single.entropy.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_hidden_spoils_only_its_own_token(bad, dtype):
    hidden, targets, head = make(7, 16, 90, dtype=dtype)
    expected = score_tokens(hidden, targets, head, chunk_bytes=2000)
    hidden[3, 5] = bad
    scores = score_tokens(hidden, targets, head, chunk_bytes=2000)
    others = torch.arange(7) != 3
    for got, want in zip(scores, expected, strict=True):
        assert not torch.isfinite(got[3])
        assert torch.equal(got[others], want[others])


MEMORY_SCRIPT = """
import json, pathlib, sys, torch
from trl_parity.scoring.head import score_tokens
from trl_parity.scoring.head_spec import Head
dtype, chunk = getattr(torch, sys.argv[1]), int(sys.argv[2])
hidden = torch.ones(1024, 1024, dtype=dtype)
weight = torch.ones(49152, 1024, dtype=dtype)
targets = torch.zeros(1024, dtype=torch.int64)
score_tokens(hidden[:8], targets[:8], Head(weight=weight[:64]))  # libraries and threads come up here
# Not ru_maxrss: that starts at the size of the process that spawned this one.
peak = lambda: 1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
scores = score_tokens(hidden, targets, Head(weight=weight), chunk_bytes=chunk)
print(json.dumps([peak() - before, scores.entropy[0].item()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="its peak is in /proc; ru_maxrss begins with the parent's")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.slow_unit
def test_peak_memory_stays_within_the_chunk(dtype):
    """Here full logits would be 192 MiB and so would an fp32 copy of the weight."""
    chunk = 24 << 20
    command = [sys.executable, "-c", MEMORY_SCRIPT, dtype, str(chunk)]
    added, entropy = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert entropy == pytest.approx(math.log(49152), abs=1e-5)
    assert 0 < added < chunk + (32 << 20)


def test_errors_say_what_was_seen_and_expected():
    hidden, targets, head = make(4, 8, 50)
    weight = head.weight
    cases = [
        (hidden[None], targets, head, r"hidden is torch.float32 \(1, 4, 8\), expected floating \(N, 8\)"),
        (hidden[:, :7], targets, head, r"\(4, 7\), expected floating \(N, 8\)"),
        (hidden.long(), targets, head, r"hidden is torch.int64"),
        (hidden, targets[:3], head, r"\(3,\) on cpu, expected torch.int64 \(4,\)"),
        (hidden, targets.int(), head, r"targets are torch.int32"),
        (hidden, targets.fill_(50), head, r"targets run from 50 to 50, expected 0 to 49"),
        (hidden, torch.tensor([0, -100, 1, 2]), head, r"targets run from -100 to 2.*ignored labels"),
        (hidden, torch.tensor([0, 45, 1, 2]), Head(weight=weight, vocab_size=45), r"to 45, expected 0 to 44"),
        (hidden, targets, Head(weight=weight[0]), r"head.weight is torch.float32 \(8,\)"),
        (hidden, targets, Head(weight=weight.to(torch.int8)), r"head.weight is torch.int8.*dequantise"),
        (hidden, targets, Head(weight=weight, bias=torch.zeros(49)), r"\(49,\), expected \(50,\)"),
        (hidden, targets, Head(weight=weight, vocab_size=51), r"vocab_size is 51, expected 1 to 50"),
        (hidden, targets, Head(weight=weight, vocab_size=0), r"vocab_size is 0"),
        (hidden, targets, Head(weight=weight, temperature=0.0), r"temperature is 0.0.*greedy"),
        (hidden, targets, Head(weight=weight, softcap=0.0), r"softcap 0.0"),
        (
            hidden,
            targets,
            Head(weight=weight, low_rank=((torch.zeros(2, 8), torch.zeros(2, 50), 1.0),)),
            r"A \(2, 8\) and B \(2, 50\), expected A \(r, 8\) and B \(50, r\)",
        ),
        (hidden.to("meta"), targets.to("meta"), head, r"hidden is on meta, the head on cpu"),
    ]
    for h, t, bad, message in cases:
        with pytest.raises(ValueError, match=message):
            score_tokens(h, t, bad)
    with pytest.raises(ValueError, match=r"out is torch.float32 \(4, 49\) on cpu, expected torch.float32 \(4, 50\)"):
        logits_chunk(hidden, head, out=torch.zeros(4, 49))
    with pytest.raises(ValueError, match=r"hidden is torch.int64"):
        logits_chunk(hidden.long(), head)


def test_no_kernel_is_tried_where_torch_is_asked_for_or_there_is_no_token():
    hidden, _, head = make(4, 8, 50)
    assert not _use_triton(hidden, head, "torch")
    assert not _use_triton(hidden[:0], head, "triton")


@pytest.mark.parametrize(
    "chunk_bytes",
    [pytest.param(1, id="number-by-number", marks=pytest.mark.slow_unit), pytest.param(1999, id="tiles"),
     pytest.param(1 << 20, id="whole-rows")],
)  # fmt: skip
@pytest.mark.parametrize("most", [1, 5, 130, 131])
def test_the_most_likely_tokens(chunk_bytes, most):
    """Against a sort in fp64, and a target among them has the very same number there."""
    hidden, targets, head = make(9, 16, 131, temperature=0.7, dtype=torch.bfloat16, logits_dtype=None)
    targets[4:] = (hidden[4:].double() @ head.weight.double().T).argmax(-1)
    top = torch.empty(9, most)
    plain = score_tokens(hidden, targets, head, chunk_bytes=chunk_bytes)
    scores = score_tokens(hidden, targets, head, chunk_bytes=chunk_bytes, top=top)
    logp = (hidden.double() @ head.weight.double().T / 0.7).log_softmax(-1)
    torch.testing.assert_close(top.double(), logp.sort(-1, descending=True).values[:, :most], atol=5e-6, rtol=0)
    assert torch.equal(scores.logprobs, plain.logprobs)
    assert torch.equal(scores.logprobs[4:], top[4:, 0])


def test_a_place_for_the_most_likely_tokens_that_does_not_fit():
    hidden, targets, head = make(3, 4, 7)
    for top in (torch.empty(3, 8), torch.empty(2, 4), torch.empty(3, 4, dtype=torch.float64), torch.empty(3)):
        with pytest.raises(ValueError, match=r"top is torch.float.*expected torch.float32 \(3, 1 to 7\)"):
            score_tokens(hidden, targets, head, top=top)
