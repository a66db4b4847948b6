"""What only a GPU can show. Skipped without one; the kernel itself is tested in Triton's interpreter as well."""

import time

import pytest
import torch

from trl_parity.metrics.statistics import compute, measure, measure_policy_drift
from trl_parity.records import SamplingSettings, ScoredBatch
from trl_parity.scoring.device_seconds import DeviceSeconds
from trl_parity.scoring.head import score_tokens
from trl_parity.scoring.head_spec import Head
from trl_parity.scoring.sampling import replay_top

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_head_is_as_exact_as_an_fp32_product(dtype, backend):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 1024, generator=g).to(dtype).cuda()
    weight = (torch.randn(50_000, 1024, generator=g) * 3 / 32).to(dtype).cuda()
    targets = torch.randint(0, 50_000, (300,), generator=g).cuda()
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    plain = (hidden.float() @ weight.float().T).log_softmax(-1)
    picked = exact.gather(1, targets[:, None])[:, 0]
    off = (plain.gather(1, targets[:, None])[:, 0].double() - picked).abs().max()
    scores = score_tokens(hidden, targets, Head(weight=weight), backend=backend)
    assert (scores.logprobs.double() - picked).abs().max() <= max(off.item(), 1e-5)
    assert (scores.entropy.double() + (exact.exp() * exact).sum(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_most_likely_tokens(backend):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 1024, generator=g).bfloat16().cuda()
    weight = (torch.randn(50_000, 1024, generator=g) * 3 / 32).bfloat16().cuda()
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    top = torch.empty(300, 64, device="cuda")
    scores = score_tokens(hidden, exact.argmax(-1), Head(weight=weight), backend=backend, top=top)
    assert (top.double() - exact.topk(64).values).abs().max() < 1e-4
    assert torch.equal(scores.logprobs, top[:, 0])


def test_truncation_is_read_from_them_without_a_wait():
    logits = torch.randn(50, 5000, device="cuda").log_softmax(-1)
    top, sampling = logits.topk(64).values, SamplingSettings(top_k=40, top_p=0.9, min_p=0.01)
    replay_top(top, top[:, 0], sampling, 5000)  # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        replay_top(top, top[:, 0], sampling, 5000)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("most", [0, 64])
def test_head_adds_no_more_memory_than_it_may(most):
    hidden = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(151_936, 1024, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 151_936, (4096,), device="cuda")
    top = torch.empty(4096, most, device="cuda") if most else None
    score_tokens(hidden[:8], targets[:8], Head(weight=weight))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    score_tokens(hidden, targets, Head(weight=weight), top=top)
    assert torch.cuda.max_memory_allocated() - before <= 256 << 20


def test_a_window_waits_for_the_device_once():
    numbers = torch.rand(6, 9, device="cuda")
    lags = torch.zeros(6, dtype=torch.long, device="cuda")
    batch = ScoredBatch(
        mask=numbers > 0.1, rollout_logprobs=-numbers, trainer_logprobs=-numbers - 0.01, own_logprobs=-numbers,
        entropy=numbers, law_entropy=numbers, lags=lags, stale=numbers < 0, in_flight=lags,
    )  # fmt: skip

    def window():
        sums = measure(batch)
        sums.add_(measure(batch))
        measure_policy_drift(sums, numbers, -numbers, batch.mask)
        sums.bump(cost_seconds=1.0)
        sums.raise_to(temperature_gap=0.1)
        return sums

    compute(window())  # constants reach the device
    torch.cuda.set_sync_debug_mode("error")  # whatever waits raises
    try:
        sums = window()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        stats = compute(sums)
    waits = sum(event.count for event in profile.key_averages() if event.key == "cudaStreamSynchronize")
    assert waits == 1  # everything on its way back
    assert stats.num_tokens


def test_the_devices_own_seconds_count_and_not_what_it_did_before():
    x = torch.randn(8192, 8192, device="cuda")
    x @ x  # kernels are loaded
    torch.cuda.synchronize()
    start = time.perf_counter()
    x @ x
    torch.cuda.synchronize()
    one, spent = time.perf_counter() - start, DeviceSeconds()
    for _ in range(4):
        x @ x
    with spent.counted():
        x @ x
    assert 0.5 * one < spent.total < 2 * one
