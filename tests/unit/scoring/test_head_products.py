"""How the torch head makes its products: in pieces, and with the precision that is asked for."""

import pytest
import torch
from support.head import make, oracle_logits
from torch.utils._python_dispatch import TorchDispatchMode

from trl_parity.scoring.head import logits_chunk, score_tokens
from trl_parity.scoring.head_spec import Head


class Products(TorchDispatchMode):
    """The hidden units in each matrix product."""

    def __init__(self):
        super().__init__()
        self.units = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::mm.out", "aten::mm"):
            self.units.append(args[0].shape[1])
        elif func.name() in ("aten::addmm.out", "aten::addmm"):
            self.units.append(args[1].shape[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "width", "units"),
    [
        (torch.float32, 128, [128]),
        (torch.float32, 300, [128, 128, 44]),
        (torch.bfloat16, 512, [512]),
        (torch.bfloat16, 600, [512, 88]),
        (torch.float16, 300, [128, 128, 44]),  # a CPU has no exact products of these
    ],
)
def test_a_long_sum_is_made_in_pieces(dtype, width, units):
    hidden, targets, head = make(8, width, 50, dtype=dtype)
    with Products() as seen:
        logits_chunk(hidden, head)
    assert seen.units == units
    with Products() as seen:
        score_tokens(hidden, targets, head)
    assert seen.units == units


def test_pieces_lose_fewer_digits_than_one_sum():
    """All terms of one sign: the running sum of one piece outgrows its terms, and their last digits are lost."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(32, 8192, generator=generator) + 0.5
    head = Head(weight=torch.rand(64, 8192, generator=generator) + 0.5)
    exact = oracle_logits(hidden, head)
    pieces = (logits_chunk(hidden, head).double() - exact).abs().mean()
    piecewise = torch.zeros(32, 64)
    for at in range(0, 8192, 128):
        piecewise += hidden[:, at : at + 128] @ head.weight[:, at : at + 128].t()
    assert pieces <= 1.5 * (piecewise.double() - exact).abs().mean()
    torch.testing.assert_close(logits_chunk(hidden, head), piecewise, rtol=3e-7, atol=0)


def test_the_precision_of_products_is_set_and_comes_back(monkeypatch):
    from trl_parity.scoring import head as module

    seen = []
    real = torch.mm

    def watched(*args, **kwargs):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return real(*args, **kwargs)

    before = torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setattr(module.torch, "mm", watched)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hidden, _, head = make(4, 16, 20, dtype=dtype)
        logits_chunk(hidden, head)
    assert seen == ["ieee", "bf16", "ieee"]
    assert torch.backends.mkldnn.matmul.fp32_precision == before
