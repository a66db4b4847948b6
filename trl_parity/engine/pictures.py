"""Pictures of a colocated engine's requests: what a prompt came with, and how to hand it over again.

A request has token ids with a short piece for each picture (often one token), and the pictures. The engine reads a
longer piece in its place: a token for each of the picture's features. To ask for a sequence as the engine reads it,
the longer pieces are made the short ones again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Pictured", "Pictures"]

_numbers = itertools.count()


class Pictures:
    """Those of one request. Nothing is copied, and nothing computed before they are handed over again.

    Args:
        llm: The ``vllm.LLM``, which tells what it reads in the place of a picture.
        prompt: The request as it was sent: ``prompt_token_ids``, ``multi_modal_data``.
    """

    def __init__(self, llm: Any, prompt: Mapping[str, Any]):
        self._llm, self._prompt, self._number = llm, prompt, next(_numbers)

    @property
    def asked(self) -> list[int]:
        """The ids they came with."""
        return list(self._prompt["prompt_token_ids"])

    @functools.cached_property
    def _pieces(self) -> list[tuple[list[int], list[int]]]:
        """By picture, in order: what stands for it in the request, and what the engine reads in its place."""
        asked = self.asked
        [read] = self._llm.renderer.render_cmpl([dict(self._prompt)], skip_mm_cache=True)
        ids = list(read["prompt_token_ids"])
        places = sorted((place.offset, place.length) for some in read["mm_placeholders"].values() for place in some)
        short = (len(asked) - len(ids) + sum(length for _, length in places)) // len(places)
        pieces, longer = [], 0
        for offset, length in places:
            at = offset - longer
            pieces.append((asked[at : at + short], ids[offset : offset + length]))
            longer += length - short
        return pieces

    def request(self, ids: Sequence[int], name: str = "") -> dict[str, Any]:
        """What the engine has to be sent to read these ids, of a sequence whose prompt has the pictures.

        ``name``: one under which the engine keeps no features of pictures yet, so that it computes theirs anew; "":
        those are read that it keeps, as the run's requests read them.
        Raises ValueError where they have no place in it.
        """
        ids, out, start = list(ids), [], 0
        for short, long in self._pieces:
            at = next((i for i in range(start, len(ids)) if ids[i : i + len(long)] == long), None)
            if at is None:
                raise ValueError(
                    f"a picture is {len(long)} tokens to the engine, which are not in these {len(ids)} ids. Do "
                    "trainer and engine prepare pictures alike (processor, size limits)?"
                )
            out += ids[start:at] + short
            start = at + len(long)
        return {**self._prompt, "prompt_token_ids": out + ids[start:]} | (self._named(name) if name else {})

    def _named(self, name: str) -> dict[str, Any]:
        names = {
            kind: [f"{name}-{self._number}-{i}" for i in range(len(data) if isinstance(data, list) else 1)]
            for kind, data in self._prompt["multi_modal_data"].items()
        }
        return {"multi_modal_uuids": names}


class Pictured(list[int]):
    """Token ids of a sequence as the engine reads them, and the pictures of its prompt."""

    def __init__(self, ids: Sequence[int], pictures: Pictures):
        super().__init__(ids)
        self.pictures = pictures
