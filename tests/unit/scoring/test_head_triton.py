import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import environment

pytestmark = pytest.mark.slow_unit


def test_the_kernels_arithmetic_in_tritons_interpreter():
    """In a process of its own: Triton reads the switch when it is first imported, and vLLM imports it here."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("head_triton_cases.py")),
    ]
    env = environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("kernel", ["_tile", "_collect"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("hidden", "weight", "terms"), [("bf16", "bf16", (0, 0)), ("bf16", "fp32", (1, 3))])
def test_the_kernels_compile_for_tensor_cores(capability, hidden, weight, terms, kernel):
    """For A100 and H100, which needs neither of them."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from trl_parity.scoring import head_triton

    kernel, tiles = getattr(head_triton, kernel), head_triton.TILES
    blocks = tiles["plain" if terms == (0, 0) and capability == 90 else "small" if terms == (0, 0) else "terms"]
    options = {"num_warps": blocks["num_warps"], "num_stages": blocks["num_stages"]}
    constants = {name: blocks[name] for name in blocks if name not in options} | {
        "HAS_BIAS": True, "HAS_SOFTCAP": True, "ROUND": True, "ROUND_DTYPE": tl_dtype("bfloat16"),
        "HIDDEN_TERMS": terms[0], "WEIGHT_TERMS": terms[1], "GROUP": 8, "WHOLE_WIDTH": True, "INTERPRETED": False,
    } | ({"ROOM": 256} if kernel is head_triton._collect else {})  # fmt: skip
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= {"hidden": f"*{hidden}", "weight": f"*{weight}", "bias": f"*{weight}"}
    pointers = {"targets": "*i64", "counts": "*i32"} | dict.fromkeys(
        ("peaks", "totals", "weighteds", "picked", "floors", "found"), "*fp32"
    )
    types |= {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
    types |= dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32")
    aligned = {"hidden", "weight", "width", "hidden_stride", "weight_stride"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    source = ASTSource(kernel, types, constants, attributes)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in compiled.asm["ptx"]
    assert compiled.metadata.shared <= (227 if capability == 90 else 163) << 10  # bytes a block may have there


def tl_dtype(name):
    import triton.language as tl

    return getattr(tl, name)
