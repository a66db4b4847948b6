"""The one way to a vLLM server: requests over HTTP, and what is raised where one fails."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["NoAnswer", "ServerAPI"]


class NoAnswer(ConnectionError):
    """The server did not answer a request in time."""


class ServerAPI:
    """What a vLLM server is asked over HTTP.

    No connection is kept between two requests: one that the server closes as idle just when it is used again would
    fail the request.

    Args:
        base_url: E.g. ``"http://127.0.0.1:8000"``.
        timeout: Seconds for each answer.

    Raises:
        NoAnswer: (every request) none came within ``timeout``.
        ConnectionError: (every request) the server can't be reached.
        RuntimeError: (every request) it refused, with its own words.
    """

    def __init__(self, base_url: str, timeout: float):
        self.base_url, self.timeout = base_url.rstrip("/"), timeout

    def text(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> str:
        """The answer to one request, as it is. ``timeout``: another one than for the rest."""
        import requests

        url, timeout = f"{self.base_url}{path}", timeout or self.timeout
        try:
            answer = requests.request(method, url, json=body, timeout=timeout)
        except requests.Timeout as e:
            raise NoAnswer(f"no answer from {url} within {timeout:g} s ({type(e).__name__})") from e
        except requests.RequestException as e:
            raise ConnectionError(f"no answer from {url} ({type(e).__name__})") from e
        if answer.status_code == 404 and not path.startswith(("/v1/", "/metrics")):
            raise RuntimeError(
                f"the vLLM server at {self.base_url} has no {path.split('?')[0]}. Expected its development endpoints: "
                "start it with VLLM_SERVER_DEV_MODE=1."
            )
        if answer.status_code != 200:
            raise RuntimeError(
                f"{path.split('?')[0]} of the vLLM server answered {answer.status_code}: {answer.text[:500]}"
            )
        return answer.text

    def json(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> Any:
        """The answer to one request, read as JSON."""
        answer = self.text(method, path, body, timeout=timeout)
        try:
            return json.loads(answer)
        except ValueError as e:
            raise RuntimeError(f"{path} of the vLLM server answered no JSON: {answer[:500]}") from e
