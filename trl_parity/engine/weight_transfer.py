"""Weight sync to a vLLM server where the trainer has no CUDA: safetensors files in a directory both processes see.

TRL hands its weights to a server over NCCL, which needs CUDA on both sides. Here the trainer writes them to a file,
tells the server its name through vLLM's own endpoints (``/start_weight_update``, ``/update_weights``,
``/finish_weight_update``), waits until the server has loaded it, and removes it. The server's half is one more of
vLLM's weight-transfer engines, registered by our plugin (``vllm_plugin``)::

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL --host 127.0.0.1 \\
        --logprobs-mode processed_logprobs --weight-transfer-config '{"backend": "trl_parity"}'

A request names no path: the folder's name and a file's, below the place both sides agreed on when they were started
(``TRL_PARITY_WEIGHTS_DIR``, else the directory for temporary files). The file's name begins with a secret of the
trainer's start, and the folder is its user's alone: who can't read the folder can't name a file in it. The server
loads regular files of its own user from such a folder; everything else gets one answer.

The trainer's half is ``FileTransfer``. ``ParityCallback()`` gives it to TRL's ``VLLMClient`` (GRPO and RLOO with
``vllm_mode="server"``) by itself where vLLM runs on the CPU; async GRPO takes it as an argument:
``AsyncGRPOTrainer(..., weight_transfer=FileTransfer("http://127.0.0.1:8000"))``. Trainer and server run as one user,
on one machine or with that place shared.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from ..errors import InterceptionError
from .cpu import BACKEND, packed_layers
from .http import ServerAPI
from .weight_files import PLACE, Folder, opened, place

__all__ = ["FileTransfer", "FileWeightTransferEngine"]


@dataclass
class _Init(WeightTransferInitInfo):
    """An empty file, so that what can't be delivered is said at the start. Nothing of it is kept by the server: one
    that was restarted takes the next update as it comes.
    """

    folder: str
    file: str


@dataclass
class _Update(WeightTransferUpdateInfo):
    """A safetensors file."""

    folder: str
    file: str


class FileWeightTransferEngine(WeightTransferEngine[_Init, _Update]):
    """The server's half: what a file holds goes through the model's own ``load_weights``, as when it is colocated."""

    init_info_cls = _Init
    update_info_cls = _Update

    def init_transfer_engine(self, init_info: _Init) -> None:
        """Whether files of this trainer can be read."""
        os.close(opened(init_info.folder, init_info.file))

    def start_weight_update(self) -> None:
        """Refuse what would go stale in silence: a layer that serves a packed copy of its weight."""
        if packed := packed_layers(self.model):
            raise InterceptionError(
                f"{len(packed)} layers serve packed copies of their weights (first: {packed[0]}), which no update "
                "reaches. Expected none: is VLLM_PLUGINS set without trl_parity_cpu?"
            )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one file. (vLLM's own then waits for an accelerator, and there is none.)"""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: _Update) -> None:
        """Load one file; the model's loader renames, packs, splits and casts."""
        from safetensors import safe_open

        descriptor = opened(update_info.folder, update_info.file)
        try:  # the file that was looked at, whatever its name means by now
            with safe_open(f"/dev/fd/{descriptor}", framework="pt") as file:
                load: Any = self.model.load_weights
                load((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        finally:
            os.close(descriptor)

    def finish_weight_update(self) -> None:
        """Nothing is left to do: layers multiply by the parameters that were written."""

    def shutdown(self) -> None:
        """Nothing to release."""


class FileTransfer:
    """The trainer's half, TRL's ``WeightTransferProtocol``. Only the main process uses it.

    Args:
        base_url: Of the server, e.g. ``"http://127.0.0.1:8000"``.
        directory: Where a folder for the files is made. Default: ``TRL_PARITY_WEIGHTS_DIR``, else ``TMPDIR``. The
            server looks there alone: for another one it is started with that variable.
        file_bytes: Size from which on a file is sent; a larger tensor has a file of its own.
        timeout: Seconds the server may take to answer one request.

    Raises:
        RuntimeError: (every method) the server refused a request, with its own words.
        requests.RequestException: (every method) it can't be reached, or did not answer in time. As TRL's own.
    """

    def __init__(
        self, base_url: str, *, directory: str | None = None, file_bytes: int = 1 << 30, timeout: float = 300.0
    ):
        self.base_url, self.file_bytes = base_url.rstrip("/"), file_bytes
        self._server = ServerAPI(base_url, timeout)
        self._parent = place() if directory is None else Path(directory)
        self._directory: Folder | None = None
        self._names = itertools.count()

    def init_weight_transfer(self) -> None:
        """Make the folder; refuse a server that was started with another weight transfer, none, or can't read it."""
        with _as_trl():
            info = self._server.json("get", "/server_info?config_format=json")["vllm_config"]
        backend = (info["weight_transfer_config"] or {}).get("backend")
        if backend != BACKEND:
            flag = f"--weight-transfer-config '{json.dumps({'backend': BACKEND})}'"
            raise RuntimeError(
                f"the vLLM server at {self._server.shown} runs with weight transfer {backend!r}, but this trainer has "
                f"no CUDA, so weights go through files. Expected a server started with {flag}, in an environment "
                "where trl-parity is installed."
            )
        self.destroy()
        self._directory = Folder(self._parent)
        try:
            with self._directory.file(next(self._names)) as (path, info):
                path.touch()
                self._post("/init_weight_transfer_engine", {"init_info": info})
        except RuntimeError as e:
            self.destroy()
            raise RuntimeError(
                f"{e}: it does not read weight files of this trainer in {self._parent}. Expected server and trainer "
                f"of one user and one version of trl-parity, on one machine or with that directory shared; a server "
                f"looks in its own TMPDIR, or where {PLACE} says: start both with {PLACE}={self._parent}."
            ) from e
        except BaseException:
            self.destroy()
            raise

    def pause(self) -> None:
        """Freeze the server's running requests; they go on after ``resume``."""
        self._post("/pause?mode=keep")

    def resume(self) -> None:
        """Go on generating."""
        self._post("/resume")

    def send_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """One update of the server's weights, whole when it returns."""
        self._post("/start_weight_update", {})
        try:
            self.deliver(named)
        except BaseException:
            with contextlib.suppress(Exception):  # the error at hand says more
                self._post("/finish_weight_update", {})
            raise
        self._post("/finish_weight_update", {})

    def deliver(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Part of an update that is under way: tensors by the trainer's names, in files of about ``file_bytes``."""
        from safetensors.torch import save_file

        if self._directory is None:
            raise RuntimeError("weights can't be sent before init_weight_transfer().")
        for tensors in self._batches(named):
            with self._directory.file(next(self._names)) as (path, info):
                save_file(tensors, path)
                self._post("/update_weights", {"update_info": info})  # answers once read

    def destroy(self) -> None:
        """Remove the folder. Idempotent."""
        if self._directory is not None:
            self._directory.remove()
            self._directory = None

    def _post(self, path: str, body: Any = None) -> None:
        with _as_trl():
            self._server.text("post", path, body)

    def _batches(self, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        tensors: dict[str, torch.Tensor] = {}
        size = 0
        for name, tensor in named:
            # a copy: what TRL yields may be gathered, or have an adapter merged in, only until it yields the next
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
            size += tensors[name].nbytes
            if size >= self.file_bytes:
                yield tensors
                tensors, size = {}, 0
        if tensors:
            yield tensors


@contextlib.contextmanager
def _as_trl() -> Iterator[None]:
    """What failed is raised as TRL's own client raises it: whoever catches that one's errors catches ours."""
    try:
        yield
    except ConnectionError as e:
        raise e.__cause__ or e from None
