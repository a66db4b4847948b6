"""What a vLLM server can be asked over HTTP: its settings, and to score tokens again. Its weights it keeps."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ..scoring.dtypes import dtype_name
from .base import Capability
from .http import ServerAPI

__all__ = ["TIMEOUT", "ServerEngine"]

TIMEOUT = 60.0  # seconds, where the config says nothing

_SIGN_OF_LIFE = 5.0  # seconds for the settings of a server that let a request wait in vain

_REQUESTS = 16  # at once

_salts = itertools.count()

# a server lays the model's generation_config over what a request leaves open
_NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class ServerEngine:
    """The server behind TRL's ``VLLMClient``, in the interface of ``ColocatedEngine``.

    Only the process that holds the client can ask. ``/server_info`` is there with ``VLLM_SERVER_DEV_MODE=1``, which
    TRL's weight transfer needs too.

    Args:
        client: TRL's.
        timeout: Seconds for each answer. After one that did not come, nothing more is asked before ``refresh``.

    ``failure``: the answer that did not come.

    Raises:
        ConnectionError: (everything that asks) the server is gone, or silent for longer than ``timeout``.
        RuntimeError: (everything that asks) it refused, with its own words.
    """

    capabilities = frozenset({Capability.RESCORE})  # it schedules by itself; weights and counts it keeps

    def __init__(self, client: Any, timeout: float = TIMEOUT):
        self._client = client
        self._api = ServerAPI(client.base_url, timeout)  # the client's own waits without end and tries for a minute
        self.failure: ConnectionError | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read its settings anew: one short request. After an answer that did not come, a sign of life is awaited."""
        timeout = None if self.failure is None else min(_SIGN_OF_LIFE, self._api.timeout)
        self.failure = None
        told = self._send("get", "/server_info?config_format=json", timeout=timeout)
        self._info: dict[str, Any] = told["vllm_config"]

    def _told(self, part: str, name: str) -> Any:
        return (self._info.get(part) or {}).get(name)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations and weights."""
        return getattr(torch, str(self._told("model_config", "dtype")).removeprefix("torch."))

    @property
    def head_dtype(self) -> torch.dtype:
        """Dtype of the lm_head's product, as far as the server tells it; else that of the model."""
        overrides = self._told("model_config", "hf_overrides")
        asked = overrides.get("head_dtype") if isinstance(overrides, dict) else None
        return getattr(torch, asked) if isinstance(asked, str) and hasattr(torch, asked) else self.dtype

    @property
    def max_model_len(self) -> int:
        """Longest sequence the engine takes."""
        return int(self._told("model_config", "max_model_len"))

    @property
    def caches_prefixes(self) -> bool:
        """Whether keys and values of earlier requests are read again."""
        return bool(self._told("cache_config", "enable_prefix_caching"))

    def setting(self, section: str, name: str, default: Any = None) -> Any:
        """As ``ColocatedEngine.setting``, where the server tells it."""
        return (self._info.get(section) or {}).get(name, default)

    def model_setting(self, name: str, default: Any = None) -> Any:
        """One entry of the overrides the server was started with: its model's config it does not tell."""
        overrides = self._told("model_config", "hf_overrides")
        return overrides.get(name, default) if isinstance(overrides, dict) else default

    def settings(self) -> dict[str, Any]:
        """What it runs with, by the names of ``Facts``."""
        quantization = self._told("model_config", "quantization")
        return {
            "logprobs_mode": str(self._told("model_config", "logprobs_mode")),
            "engine_dtype": dtype_name(self.dtype),
            "engine_head_dtype": dtype_name(self.head_dtype),
            "kv_cache_dtype": str(self._told("cache_config", "cache_dtype")),
            "quantization": None if quantization is None else str(quantization),
            "prefix_caching": self.caches_prefixes,
        }

    def everything(self) -> dict[str, Any]:
        """Settings worth keeping with an incident: JSON."""
        parts = (
            ("cache_config", ("block_size",)),
            ("scheduler_config", ("enable_chunked_prefill", "max_num_batched_tokens", "max_num_seqs")),
            ("model_config", ("model", "enforce_eager", "max_logprobs", "generation_config", "seed")),
            ("parallel_config", ("tensor_parallel_size", "data_parallel_size")),
        )
        out = self.settings() | {"url": self._api.shown, "max_model_len": self.max_model_len}
        found = {name: self._told(part, name) for part, names in parts for name in names}
        return out | {n: v if isinstance(v, int | float | str | None) else str(v) for n, v in found.items()}

    @property
    def instance(self) -> str:
        """Another one when the server was restarted."""
        return str(self._info.get("instance_id"))

    def rescore(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """As ``ColocatedEngine.rescore``."""
        answers = self._ask({"prompt": [list(ids) for ids in sequences], "temperature": 0.0, "prompt_logprobs": 0})
        scores = []
        for ids, answer in zip(sequences, answers, strict=True):
            given = answer["prompt_logprobs"][1:]
            scores.append(torch.tensor([given[i][str(token)]["logprob"] for i, token in enumerate(ids[1:])]))
        return scores

    def next_token(
        self, contexts: Sequence[Sequence[int]], targets: Sequence[int], temperature: float, *, cached: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``ColocatedEngine.next_token``; how many were cached is not told: 1 each."""

        def ask(context: Sequence[int], token: int) -> float:
            settings = {"temperature": temperature, "seed": 0, "logprobs": 1, "logprob_token_ids": [token], **_NEUTRAL}
            request = {"prompt": list(context), "return_tokens_as_token_ids": True, **settings}
            [answer] = self._ask(request, cached=cached)
            return float(answer["logprobs"]["top_logprobs"][0][f"token_id:{token}"])

        with ThreadPoolExecutor(_REQUESTS) as pool:
            reported = list(pool.map(ask, contexts, targets))
        return torch.tensor(reported), torch.ones(len(reported)) * cached

    def generate(
        self, contexts: Sequence[Sequence[int]], sampling: Mapping[str, Any], max_tokens: int, seed: int
    ) -> list[tuple[list[int], list[float]]]:
        """Token ids and reported log-probs of one continuation of each context, cached as the run's own requests.

        Requests draw from seeds of their own, from ``seed`` on: with one for all, sequences would share their noise.
        """

        def ask(context: Sequence[int], own: int) -> tuple[list[int], list[float]]:
            request = {"prompt": list(context), "max_tokens": max_tokens, "seed": own, "logprobs": 0}
            [answer] = self._ask(request | {"return_token_ids": True} | _NEUTRAL | dict(sampling), cached=True)
            return answer["token_ids"], answer["logprobs"]["token_logprobs"]

        with ThreadPoolExecutor(_REQUESTS) as pool:
            return list(pool.map(ask, contexts, range(seed, seed + len(contexts))))

    def _ask(self, request: dict[str, Any], *, cached: bool = False) -> list[dict[str, Any]]:
        # what is cached for us lies under a name that no request of the run reads
        salt = {} if cached else {"cache_salt": f"trl-parity-{os.getpid()}-{next(_salts)}"}
        request = {"model": self._client.model, "max_tokens": 1, **salt, **request}
        answer = self._send("post", "/v1/completions", request)
        return sorted(answer["choices"], key=lambda choice: choice["index"])

    def _send(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> Any:
        if self.failure is not None:
            raise type(self.failure)(str(self.failure))
        try:
            return self._api.json(method, path, body, timeout=timeout)
        except ConnectionError as e:
            self.failure = e
            raise
