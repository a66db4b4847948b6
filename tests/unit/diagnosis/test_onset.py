"""Where a drift begins, and which rows are looked at one by one."""

import pytest
import torch

from trl_parity.diagnosis.counterfactual import _few
from trl_parity.diagnosis.probes.weight_sync import _arrived
from trl_parity.diagnosis.profiles import onset
from trl_parity.engine.weight_readback import HeldTensor


@pytest.mark.parametrize("at", [5, 17, 40])
def test_the_first_position_of_a_drift_is_found(at):
    position = torch.arange(50).repeat(4)
    noise = 1e-6 * torch.rand(len(position), generator=torch.Generator().manual_seed(at))
    assert onset(noise + 0.02 * (position >= at), position, 1e-6) == at


def test_no_place_is_named_where_there_is_none():
    position = torch.arange(50).repeat(4)
    noise = torch.rand(len(position), generator=torch.Generator().manual_seed(0))
    assert onset(noise, position, 1e-6) is None  # everywhere
    assert onset(noise * (1.0 + position / 50.0), position, 1e-6) is None  # growing
    assert onset(1e-7 * (position >= 20).double(), position, 1e-6) is None  # below the floor
    assert onset((position >= 48).double(), position, 1e-6) is None  # of too few tokens to tell
    assert onset(torch.zeros(0), torch.zeros(0), 1e-6) is None


def test_the_few_are_those_that_disagree_most_of_several_prompts():
    prompts = torch.tensor([[1, 1], [1, 1], [2, 2], [2, 2], [3, 3], [3, 3], [3, 3]])
    row = torch.arange(7).repeat_interleave(3)
    size = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.0, 0.3, 0.0]).repeat_interleave(3)
    assert _few(prompts, row, size).tolist() == [0, 1, 3, 5]  # 0, 5 and 3 of their prompts, then 1
    assert _few(prompts[:2], row[:6], size[:6]).tolist() == [0, 1]
    assert _few(prompts, row[:3], size[:3]).tolist()[0] == 0  # rows without tokens come last


def read(name, tensor, older, dtype):
    """What reading it back tells where the engine holds the older one."""
    differing = int((tensor.to(dtype) != older.to(dtype)).sum())
    gap = float((tensor - older.to(dtype).float()).abs().mean())
    return HeldTensor(name, tensor.numel(), tensor.numel(), differing, gap, None), tensor


def arrived(trained, differing, dtype, share=1.0):
    """Tensors that arrived, updates having moved this share of their elements."""
    return _arrived([(*known, share) for known in trained], differing, dtype)


def test_a_norm_that_can_not_show_an_update_has_not_arrived():
    """Adam moves all elements alike: by 3e-4, which bf16 shows beside .02 and not beside 1."""
    g = torch.Generator().manual_seed(0)
    matrix, norm = 0.02 * torch.randn(64, 128, generator=g), torch.ones(256)
    older = [x - 3e-4 * torch.randn(x.shape, generator=g).sign() for x in (matrix, norm)]
    stale = read("matrix", matrix, older[0], torch.bfloat16)
    unmoved = read("norm", norm, older[1], torch.bfloat16)
    assert stale[0].differing > 5000
    assert unmoved[0].differing == 0
    assert arrived([stale, unmoved], [stale], torch.bfloat16) == 0
    fresh = read("other", matrix, matrix, torch.bfloat16)  # a matrix would have shown it
    assert arrived([stale, unmoved, fresh], [stale], torch.bfloat16) == 1
    assert arrived([stale, unmoved, fresh], [stale], torch.bfloat16, share=0.0) == 0  # not one that nothing moved
    exact = read("norm", norm, norm, torch.float32)  # and so would a norm in float32
    stale = read("matrix", matrix, older[0], torch.float32)
    assert arrived([stale, exact], [stale], torch.float32) == 1
