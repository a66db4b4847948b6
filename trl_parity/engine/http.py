"""The one way to a vLLM server: requests over HTTP, and what is raised where one fails."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ..credentials import HIDDEN, masked

if TYPE_CHECKING:
    import requests

__all__ = ["API_KEY", "NoAnswer", "ServerAPI"]

API_KEY = "VLLM_API_KEY"  # environment variable: the server's own name for what it was started with

_LARGEST = 64 << 20  # bytes of an answer; 100 a token that is scored again

_PIECE = 1 << 16

_AT_ONCE = 32  # requests of one ServerAPI under way, those given up among them


class NoAnswer(ConnectionError):
    """The server did not answer a request in time."""


class ServerAPI:
    """What a vLLM server is asked over HTTP.

    No connection is kept between two requests: one that the server closes as idle just when it is used again would
    fail the request. No redirect is followed, and no answer of more than 64 MiB is read.

    With ``VLLM_API_KEY`` in the environment each request carries it (``Authorization: Bearer``), unless the address
    has a user and a password. Neither stands in an error.

    Args:
        base_url: E.g. ``"http://127.0.0.1:8000"``.
        timeout: Seconds for each answer, from the look-up of the address to the last byte.

    Raises:
        NoAnswer: (every request) none was complete within ``timeout``.
        ConnectionError: (every request) the server can't be reached.
        RuntimeError: (every request) it refused, with its own words, or its answer is too large.
    """

    def __init__(self, base_url: str, timeout: float):
        self.base_url, self.timeout = base_url.rstrip("/"), timeout
        self.shown = masked(self.base_url)
        self._free = threading.BoundedSemaphore(_AT_ONCE)

    def text(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> str:
        """The answer to one request, as it is. ``timeout``: another one than for the rest."""
        status, answer = self._awaited(method, path, body, timeout or self.timeout)
        if status == 404 and not path.startswith(("/v1/", "/metrics")):
            raise RuntimeError(
                f"the vLLM server at {self.shown} has no {path.split('?')[0]}. Expected its development endpoints: "
                "start it with VLLM_SERVER_DEV_MODE=1."
            )
        if status != 200:
            raise RuntimeError(f"{path.split('?')[0]} of the vLLM server answered {status}: {_quoted(answer)}")
        return answer

    def json(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> Any:
        """The answer to one request, read as JSON."""
        answer = self.text(method, path, body, timeout=timeout)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as e:
            raise RuntimeError(f"{path} of the vLLM server answered no JSON: {_quoted(answer)}") from e

    def _awaited(self, method: str, path: str, body: Any, timeout: float) -> tuple[int, str]:
        """Status and answer. A thread asks, since nothing else bounds the whole: a look-up that hangs, an answer that
        comes byte by byte.
        """
        import requests

        end = time.monotonic() + timeout
        shown, done = f"{self.shown}{path}", Future[tuple[int, str]]()

        def ask() -> None:
            try:
                done.set_result(self._asked(method, path, body, timeout))
            except BaseException as e:
                done.set_exception(e)
            finally:
                self._free.release()

        try:
            if not self._free.acquire(timeout=timeout):
                raise TimeoutError
            threading.Thread(target=ask, name="trl-parity-request", daemon=True).start()
            return done.result(max(0.0, end - time.monotonic()))
        except (requests.Timeout, TimeoutError) as e:
            cause = e if isinstance(e, requests.Timeout) else requests.ReadTimeout()
            raise NoAnswer(f"no answer from {shown} within {timeout:g} s ({type(cause).__name__})") from cause
        except requests.RequestException as e:
            raise ConnectionError(f"no answer from {shown} ({type(e).__name__})") from e

    def _asked(self, method: str, path: str, body: Any, timeout: float) -> tuple[int, str]:
        import requests

        with requests.request(
            method, f"{self.base_url}{path}", json=body, timeout=timeout, auth=self._key(), stream=True,
            allow_redirects=False, headers={"Accept-Encoding": "identity"},
        ) as answer:  # fmt: skip
            name = path.split("?")[0]
            if (packed := answer.headers.get("Content-Encoding", "identity")) != "identity":
                raise RuntimeError(f"{name} of the vLLM server answered {packed!r:.40}. Expected it as it is.")
            content = bytearray()
            for piece in answer.iter_content(_PIECE):
                content += piece
                if len(content) > _LARGEST:
                    raise RuntimeError(
                        f"{name} of the vLLM server answered more than {_LARGEST >> 20} MiB. Expected less: is it one?"
                    )
            return answer.status_code, content.decode("utf-8", "replace")

    def _key(self) -> Any:
        """What adds the key to a request; None where there is none, or the address has user and password."""
        key = os.environ.get(API_KEY, "").strip()
        if not key or "@" in self.base_url.partition("://")[2].split("/")[0]:
            return None

        def with_key(request: requests.PreparedRequest) -> requests.PreparedRequest:
            request.headers["Authorization"] = f"Bearer {key}"
            return request

        return with_key


def _quoted(answer: str) -> str:
    """The beginning of a server's words, without a key that it repeats."""
    key = os.environ.get(API_KEY, "").strip()
    return masked((answer.replace(key, HIDDEN) if key else answer)[:500])
