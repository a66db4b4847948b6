"""What an engine's logits are to those of the trainer's head on the same hidden states."""

import pytest
import torch

from trl_parity.diagnosis.probes.engine_head import _in_words

Z = 3.0 * torch.randn(40, 60, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_logits_are_told(dtype):
    cause, words = _in_words(Z.to(dtype).float(), Z, torch.float32, redacted=False)
    assert cause == "head_precision"
    assert words.endswith(f"the same rounded to {str(dtype).removeprefix('torch.')}")


def test_logits_on_a_narrower_grid_than_the_heads_were_rounded_to_it():
    """Rounded twice, they are not what one rounding makes of the trainer's; the grid tells."""
    twice = Z.bfloat16().to(torch.float8_e4m3fn).float()
    cause, words = _in_words(twice, Z, torch.bfloat16, redacted=False)
    assert (cause, words.rsplit(" ", 1)[1]) == ("head_precision", "float8_e4m3fn")


def test_one_bias_on_all_tokens_is_told_and_redacted():
    bias = torch.linspace(-1.0, 1.0, 60)
    bias[17] = 4.0
    noise = 0.01 * torch.randn(Z.shape, generator=torch.Generator().manual_seed(1))
    cause, words = _in_words(Z + bias + noise, Z, torch.float32, redacted=False)
    assert cause == "constrained_decoding"
    assert words.endswith("on token 17 the most")
    assert "17" not in _in_words(Z + bias + noise, Z, torch.float32, redacted=True)[1].split(": ")[1].split(" on ")[1]


def test_anything_else_is_another_function_of_the_same_states():
    cause, words = _in_words(Z + 0.3 * Z.roll(1, 1), Z, torch.float32, redacted=False)
    assert cause == "model_definition"
    assert "the trainer's head makes other logits than the engine" in words


def test_what_rounding_may_leave_is_no_other_function():
    """A head whose sums are of bfloat16 products: near the noise floor this can be all there is of a faint drift."""
    noise = torch.randn(Z.shape, generator=torch.Generator().manual_seed(2))
    cause, words = _in_words(Z + 3e-3 * noise, Z, torch.bfloat16, redacted=False)
    assert not cause
    assert words.endswith("apart on average: no more than sums in bfloat16 differ by)")
    assert _in_words(Z + 3e-3 * noise, Z, torch.float32, redacted=False)[0] == "model_definition"
    assert _in_words(Z + 0.1 * noise, Z, torch.bfloat16, redacted=False)[0] == "model_definition"
