"""Coarse key-value caches against a nearest point found by trying all of them."""

import pytest
import torch

from trl_parity.scoring.cache_grids import coarser_grids, declared_grids, rounded_cache

X = (
    torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(3))
    * torch.tensor([0.01, 1.0, 30.0])[:, None, None]
)


def distance(x, points):
    """Of each number to its nearest point: of two as near, either will do."""
    return (x.double().unsqueeze(-1) - points.double()).abs().amin(-1)


@pytest.mark.parametrize(
    ("setting", "dtype"),
    [("float16", torch.float16), ("bfloat16", torch.bfloat16), ("fp8", torch.float8_e4m3fn),
     ("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)  # fmt: skip
def test_a_cache_of_a_dtype_holds_the_nearest_numbers_of_it(setting, dtype):
    grid = declared_grids(setting)[0]
    rounded = grid.round(X)
    assert rounded.dtype == X.dtype
    assert torch.equal(rounded, X.to(dtype).float())
    assert torch.equal(grid.round(rounded), rounded)
    assert torch.isfinite(grid.round(torch.tensor([[1e30, -1e30]]))).all()  # as large as it goes


@pytest.mark.parametrize(
    ("setting", "whole"), [("int8_per_token_head", 127), ("int4_per_token_head", 15), ("fp8_per_token_head", None)]
)
def test_a_scale_by_token_and_head_gives_the_nearest_points_of_each(setting, whole):
    [grid] = declared_grids(setting)
    rounded = grid.round(X).double()
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        x = X[tuple(index)].double()
        if whole == 127:
            points = torch.arange(-127, 128).double() * x.abs().max() / 127
        elif whole == 15:
            points = x.min() + torch.arange(16).double() * (x.max() - x.min()) / 15
        else:
            every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
            points = every[torch.isfinite(every)] * x.abs().max() / 448
        error = (rounded[tuple(index)] - x).abs()
        torch.testing.assert_close(error, distance(x, points), atol=1e-6 * float(x.abs().max()), rtol=0)


def test_towards_zero_is_the_upper_byte_of_fp16():
    cut = declared_grids("fp8_e5m2")[1]
    rounded = cut.round(X)
    assert (rounded.abs() <= X.half().float().abs()).all()
    assert torch.equal(rounded, rounded.to(torch.float8_e5m2).float())
    assert ((X.half().float() - rounded).abs() <= 0.25 * X.half().float().abs()).all()


def test_no_grid_is_declared_for_the_engines_own_dtype_nor_for_what_is_not_known():
    assert declared_grids("auto") == declared_grids("turboquant_4bit_nc") == ()


def test_only_what_rounds_a_dtype_is_coarser():
    names = {dtype: [grid.name for grid in coarser_grids(dtype)] for dtype in (torch.float32, torch.bfloat16)}
    assert {"float16", "bfloat16", "float8_e4m3fn"} <= set(names[torch.float32])
    assert not {"float16", "bfloat16"} & set(names[torch.bfloat16])
    for dtype in names:
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        for grid in coarser_grids(dtype):
            assert not torch.equal(grid.round(x), x), grid.name


def test_attention_reads_rounded_keys_and_values_inside_the_block_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, initializer_range=0.2)
    ).eval()  # fmt: skip
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        apart = []
        for grid in coarser_grids(torch.float32):
            with rounded_cache(model.model, grid):
                apart.append(float((model(input_ids=ids).logits - plain).abs().mean()))
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert min(apart) > 0
    names = [grid.name for grid in coarser_grids(torch.float32)]
    assert apart[names.index("float16")] < apart[names.index("bfloat16")] < apart[names.index("float8_e5m2")]


def test_a_grid_that_cuts_digits_off_scales_and_one_that_rounds_does_not():
    scales = {grid.name: grid.scale for grid in coarser_grids(torch.bfloat16)}
    cut = scales.pop("float8_e5m2, towards zero")
    assert 0.85 < cut < 0.95
    assert all(abs(scale - 1.0) < 0.01 for name, scale in scales.items() if "int4" not in name), scales
    x = torch.randn(2, 3, 8)
    [grid] = [grid for grid in coarser_grids(torch.bfloat16) if grid.name.endswith("zero")]
    assert torch.allclose(grid.only_scaled().round(x), cut * x)
