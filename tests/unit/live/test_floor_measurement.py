"""What the noise floor is measured with."""

from types import SimpleNamespace

import pytest
import torch

from trl_parity.live.floor_measurement import noise_dtype
from trl_parity.trainers.capture import Capture


@pytest.mark.parametrize(
    ("engine", "mixed", "expected"),
    [
        (torch.bfloat16, "no", torch.bfloat16),
        (torch.float16, "bf16", torch.bfloat16),
        (torch.float32, "no", torch.float32),
        (torch.float32, "fp16", torch.float16),
    ],
)
def test_noise_has_the_coarser_dtype_of_both_sides(tiny_model, engine, mixed, expected):
    trainer = SimpleNamespace(accelerator=SimpleNamespace(mixed_precision=mixed))
    reader = SimpleNamespace(trainer=trainer, policy=tiny_model)
    capture = SimpleNamespace(compute_dtype=Capture.compute_dtype.fget(reader))
    assert noise_dtype(engine, capture) == expected
