import subprocess
import sys

import pytest
from support import HERE, environment


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
        str(HERE / "head_triton_cases.py"),
    ]
    env = environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("hidden", "weight", "terms"), [("bf16", "bf16", (0, 0)), ("bf16", "fp32", (1, 3))])
def test_the_kernel_compiles_for_tensor_cores(capability, hidden, weight, terms):
    """For A100 and H100, which needs neither of them."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from trl_parity.head_triton import TILES, _tile

    blocks = TILES["plain" if terms == (0, 0) and capability == 90 else "small" if terms == (0, 0) else "terms"]
    options = {"num_warps": blocks["num_warps"], "num_stages": blocks["num_stages"]}
    constants = {name: blocks[name] for name in blocks if name not in options} | {
        "HAS_BIAS": True, "HAS_SOFTCAP": True, "ROUND": True, "ROUND_DTYPE": tl_dtype("bfloat16"),
        "HIDDEN_TERMS": terms[0], "WEIGHT_TERMS": terms[1], "GROUP": 8, "WHOLE_WIDTH": True, "INTERPRETED": False,
    }  # fmt: skip
    types = dict.fromkeys(_tile.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= {"hidden": f"*{hidden}", "weight": f"*{weight}", "bias": f"*{weight}", "targets": "*i64"}
    types |= dict.fromkeys(("peaks", "totals", "weighteds", "picked"), "*fp32")
    types |= dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32")
    aligned = {"hidden", "weight", "width", "hidden_stride", "weight_stride"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(_tile.arg_names) if name in aligned}
    source = ASTSource(_tile, types, constants, attributes)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in compiled.asm["ptx"]
    assert compiled.metadata.shared <= (227 if capability == 90 else 163) << 10  # bytes a block may have there


def tl_dtype(name):
    import triton.language as tl

    return getattr(tl, name)
