"""Weights of GRPO and RLOO to a vLLM server where there is no CUDA. Written against TRL 1.16.

Names used of TRL's VLLMClient: ``base_url``, ``communicator``, ``init_communicator``, ``update_named_params``,
``close_communicator``, ``_updating_weights``.
"""

from __future__ import annotations

import atexit
from typing import Any

import torch

__all__ = ["sync_without_cuda"]

_MARK = "_trl_parity_without_cuda"


def sync_without_cuda() -> None:
    """Let TRL's ``VLLMClient`` deliver weights by ``FileTransfer`` where the trainer's device is not CUDA.

    TRL's own transfer refuses such a device; on CUDA nothing changes. Idempotent.
    """
    from trl.generation.vllm_client import VLLMClient

    from ..engine.weight_transfer import FileTransfer

    names = ("init_communicator", "update_named_params", "close_communicator")
    if getattr(VLLMClient, _MARK, False) or not all(hasattr(VLLMClient, name) for name in names):
        return  # the second: an older TRL, whose own error then says what it needs
    init, update, close = VLLMClient.init_communicator, VLLMClient.update_named_params, VLLMClient.close_communicator

    def init_communicator(self: Any, device: Any = 0) -> None:
        if isinstance(device, int) or torch.device(device).type == "cuda":
            init(self, device)
            return
        transfer = FileTransfer(self.base_url)
        transfer.init_weight_transfer()
        self.communicator = transfer
        atexit.register(self.close_communicator)

    def update_named_params(self: Any, metadata: Any, named_params: Any) -> None:
        if not isinstance(self.communicator, FileTransfer):
            update(self, metadata, named_params)
        elif self._updating_weights:  # inside client.weight_update(), which starts and finishes
            self.communicator.deliver(named_params)
        else:
            self.communicator.send_weights(named_params)

    def close_communicator(self: Any) -> None:
        if isinstance(self.communicator, FileTransfer):
            self.communicator.destroy()
            self.communicator = None
        else:
            close(self)

    for method in (init_communicator, update_named_params, close_communicator):
        setattr(VLLMClient, method.__name__, method)
    setattr(VLLMClient, _MARK, True)
