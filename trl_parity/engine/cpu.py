"""Weight sync for vLLM on a CPU: keep every linear layer on its live weight.

After loading, vLLM's CPU build packs linear weights for faster kernels (oneDNN; on chips with AMX the SGL
kernels; on AMD Zen zentorch) and drops or copies the originals. TRL's per-step ``load_weights`` then fails with
``'Parameter' object has no attribute 'weight_loader'`` or, for the lm_head, succeeds while the packed copy that is
served goes stale in silence. With packing off, each layer multiplies by the parameter that ``load_weights`` writes.

This is vLLM's private ground: the one function replaced here is ``dispatch_cpu_unquantized_gemm``, which vLLM looks
up at each call, so replacing it before an engine is built is enough.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from ..errors import InterceptionError

logger = logging.getLogger(__name__)

BACKEND = "trl_parity"  # of vLLM's --weight-transfer-config: weights come as files, see weight_transfer.py

_MARK = "_trl_parity_live_weights"


def is_vllm_cpu() -> bool:
    """Whether vLLM is installed and would run on the CPU here."""
    if importlib.util.find_spec("vllm") is None:
        return False
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def prepare_cpu_engine() -> bool:
    """Make engines built from now on in this process serve their live weights, when vLLM runs on the CPU.

    Idempotent; does nothing on other platforms. Returns whether packing is off afterwards.
    """
    if not is_vllm_cpu():
        return False
    import torch
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm
    if getattr(original, _MARK, False):
        return True

    def dispatch_live_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
        weight = layer.weight
        if weight.is_meta or weight.ndim != 2:  # no linear layer: vLLM's own way
            original(layer, remove_weight)
        else:
            layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    setattr(dispatch_live_weight, _MARK, True)
    utils.dispatch_cpu_unquantized_gemm = dispatch_live_weight
    logger.warning(
        "vLLM runs on the CPU: weight packing is off in this process, so that synced weights reach the served "
        "copy (linear layers use torch.nn.functional.linear)."
    )
    return True


def vllm_plugin() -> None:
    """Entry point in ``vllm.general_plugins``: in every engine and server process, live weights and how they come."""
    if not prepare_cpu_engine():
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        module = f"{__package__}.weight_transfer"
        WeightTransferEngineFactory.register_engine(BACKEND, module, "FileWeightTransferEngine")


def packed_layers(model: Any) -> list[str]:
    """Names of layers of a loaded vLLM model that serve a packed copy instead of their live weight.

    Empty on every platform but the CPU, and there when ``prepare_cpu_engine`` ran before the engine was built.
    """
    import torch

    return [
        name
        for name, layer in model.named_modules()
        if getattr(layer, "cpu_linear", torch.nn.functional.linear) is not torch.nn.functional.linear
    ]


def require_live_weights(llm: Any) -> None:
    """Raise ``InterceptionError`` if a colocated CPU engine serves packed copies."""
    if not is_vllm_cpu():
        return
    packed = packed_layers(llm.llm_engine.model_executor.driver_worker.model_runner.model)
    if packed:
        raise InterceptionError(
            f"the vLLM engine was built with packed weights ({len(packed)} layers, first: {packed[0]}), so weight "
            "sync cannot reach what it serves. Create ParityCallback before the trainer and pass it in "
            "callbacks=[...]; trainer.add_callback() is too late on a CPU."
        )
