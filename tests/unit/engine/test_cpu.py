"""The weights that vLLM's CPU layers really multiply with."""

import pytest
from support.processes import python

pytestmark = pytest.mark.slow_unit

PLUGIN = """
from vllm.plugins import load_general_plugins
load_general_plugins()
import torch
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
for dtype in (torch.float32, torch.bfloat16):
    layer = torch.nn.Linear(64, 64, bias=False, dtype=dtype)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    x = torch.randn(8, 64, dtype=dtype)
    layer.weight.data.fill_(0.5)  # what a weight sync does
    torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), x @ torch.full((64, 64), 0.5, dtype=dtype))
print("LIVE")
"""


def test_the_vllm_plugin_keeps_live_weights_in_every_engine_process():
    done = python(PLUGIN)
    assert "LIVE" in done.stdout, done.stderr[-3000:]
