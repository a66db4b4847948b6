"""Weight sync for vLLM on a CPU: keep every linear layer, and every expert, on its live weight.

After loading, vLLM's CPU build packs linear weights for faster kernels (oneDNN; on chips with AMX the SGL
kernels; on AMD Zen zentorch) and drops or copies the originals. TRL's per-step ``load_weights`` then fails with
``'Parameter' object has no attribute 'weight_loader'`` or, for the lm_head, succeeds while the packed copy that is
served goes stale in silence. Experts are rearranged in the parameter itself: a sync writes rows as they are into a
layout that is not theirs, without an error (.06 to 1.6 nats off from then on). With packing off, each layer multiplies
by the parameter that ``load_weights`` writes; experts, whose kernel wants its own layout, are packed at each call.

This is vLLM's private ground: ``dispatch_cpu_unquantized_gemm``, which vLLM looks up at each call, and the two methods
of ``CPUUnquantizedExperts`` that pack experts and hand them to the kernel. Replaced before an engine is built.
"""

from __future__ import annotations

import importlib
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
    _keep_experts_live()
    logger.warning(
        "vLLM runs on the CPU: weight packing is off in this process, so that synced weights reach the served "
        "copy (linear layers use torch.nn.functional.linear)."
    )
    return True


def _keep_experts_live() -> None:
    """Experts stay as loaded and are packed for the kernel at each call; where they are padded too, vLLM's own way."""
    try:
        cpu_moe: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
        experts = cpu_moe.CPUUnquantizedExperts
    except (ImportError, AttributeError):  # another vLLM: what it packs is refused by ``require_live_weights``
        return
    finish, apply = experts.process_weights_after_loading, experts.apply

    def finish_live(self: Any, layer: Any) -> None:
        padded = self._padded_intermediate_size(self.moe_config) != self.moe_config.intermediate_size_per_partition
        zen = cpu_moe.is_zentorch_moe_supported(layer)  # whose kernel takes them as they are
        if padded or zen:
            finish(self, layer)
        self._packs_at_each_call = not padded and not zen
        setattr(layer, _MARK, not padded)

    def apply_live(self: Any, output: Any, hidden_states: Any, w1: Any, w2: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(self, "_packs_at_each_call", False):
            w1, w2 = (cpu_moe.cpu_prepack_moe_weight(w, self.isa) for w in (w1, w2))
        apply(self, output, hidden_states, w1, w2, *args, **kwargs)

    experts.process_weights_after_loading, experts.apply = finish_live, apply_live


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
        or ("w13_weight" in layer._parameters and not getattr(layer, _MARK, False))
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
            "callbacks=[...]; trainer.add_callback() is too late on a CPU. Experts whose size the kernel pads (no "
            "multiple of its width) or whose vLLM packs in another way can't be kept live: use a GPU for them."
        )
