"""Prompts as token ids: what a tokenizer can make them of, a user's own file of them, a batch as printable text."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError
from ...files import bounded_lines, open_regular, parse_json

__all__ = ["LONGEST_LINE", "Case", "Prompt", "Vocabulary", "read_jsonl"]

LONGEST_LINE = 1 << 24  # bytes of a prompt in a file

_CODE = (
    'def mean(xs: list[float]) -> float:\n    """Of an empty list: 0."""\n    return sum(xs) / max(1, len(xs))\n',
    "for (int i = 0; i < n; ++i) {\n\ta[i] = b[i] * 2;  // twice\n}\n",
    '{"name": "add", "arguments": {"a": [1, -2.5e3, null], "b": {}}}\n',
)

_UNICODE = (
    "Grüße, 世界! Привет, мир. مرحبا بالعالم שלום עולם 안녕하세요 สวัสดี",
    "👩‍👩‍👧‍👦 🇪🇺 🏳️‍🌈 e\u0301 \u00e9 ﬁ Å \u200b\u200d\ufeff \u202eabc\u202c 𝒳 ½ ∑∫√ «»„“",
)

_CHATS = (
    [{"role": "user"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user"}],
    [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}, {"role": "user"}],
)

_SENTINEL = "7f3c91e0"  # marks the place of a conversation's last turn in the rendered template

_READABLE = 2000  # characters of a case that people may still read


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and what they are made of."""

    ids: tuple[int, ...]
    kind: str  # of the structure: repeat, random, special, unicode, code, chat, shared+...; of a file: text, chat, ids


@dataclass(frozen=True, slots=True)
class Case:
    """A batch as text that a command line can carry: what reproduces a failure."""

    batch: tuple[Prompt, ...]

    def to_text(self) -> str:
        """``kind:ids`` joined by ``/``; ``5x12`` is token 5 twelve times. A long one is packed: ``z:`` and base64.

        Nothing in it needs quoting in a shell.
        """
        text = "/".join(f"{p.kind}:{_runs(p.ids)}" for p in self.batch)
        if len(text) <= _READABLE:
            return text
        return "z:" + base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode()

    @classmethod
    def from_text(cls, text: str) -> Case:
        """What ``to_text`` wrote. Raises ConfigError."""
        try:
            readable = zlib.decompress(base64.urlsafe_b64decode(text[2:])).decode() if text.startswith("z:") else text
            parts = [part.rpartition(":") for part in readable.strip().split("/")]
            return cls(tuple(Prompt(_ids(ids), kind) for kind, _, ids in parts))
        except (ValueError, zlib.error) as e:
            raise ConfigError(
                f"{text[:60]!r} is no case ({e}). Expected kind:ids joined by '/', e.g. repeat:5x12,7/code:3,4, as "
                "a failed trial prints it."
            ) from e


def _runs(ids: Iterable[int]) -> str:
    runs = ((token, len(list(same))) for token, same in groupby(ids))
    return ",".join(f"{token}x{n}" if n > 1 else str(token) for token, n in runs)


def _ids(text: str) -> tuple[int, ...]:
    ids: list[int] = []
    for run in text.split(","):
        if not (match := re.fullmatch(r"(\d+)(?:x(\d+))?", run)):
            raise ValueError(f"{run[:20]!r} is neither an id nor id x times")
        ids += [int(match[1])] * int(match[2] or 1)
    if not ids:
        raise ValueError("a prompt without tokens")
    return tuple(ids)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a tokenizer's prompts can be made of, as token ids; a part it has nothing for is empty."""

    ordinary: tuple[int, ...]  # every token that is not special, in the order of ids
    special: tuple[int, ...] = ()
    unicode: tuple[int, ...] = ()  # among the ordinary: bytes and characters beyond ASCII
    code: tuple[tuple[int, ...], ...] = ()  # snippets
    text: tuple[tuple[int, ...], ...] = ()  # texts in several scripts, emoji, marks without width
    chats: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()  # what a template puts before and after a turn

    @classmethod
    def of(cls, tokenizer: Any, size: int | None = None) -> Vocabulary:
        """Read a transformers tokenizer, with or without a chat template.

        ``size``: entries of the model's embedding, where the tokenizer may know more. Raises ConfigError where no
        ordinary token is left.
        """
        ids = sorted(i for i in set(tokenizer.get_vocab().values()) if size is None or i < size)
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special = marked | set(tokenizer.all_special_ids)
        ordinary = tuple(i for i in ids if i not in special)
        if not ordinary:
            raise ConfigError(
                f"the tokenizer has {len(ids)} tokens and no ordinary one. Expected some to make prompts of."
            )
        decoded = _decoded(tokenizer, ordinary)
        known = set(ordinary) - {tokenizer.unk_token_id}

        def encoded(text: str) -> tuple[int, ...]:
            return tuple(i for i in tokenizer.encode(text, add_special_tokens=False) if i in known)

        def framed(text: str) -> tuple[int, ...]:
            return tuple(i for i in tokenizer.encode(text, add_special_tokens=False) if size is None or i < size)

        frames = (_frame(tokenizer, chat) for chat in _CHATS)
        return cls(
            ordinary=ordinary,
            special=tuple(i for i in ids if i in special),
            unicode=tuple(i for i, text in zip(ordinary, decoded, strict=True) if not text.isascii()),
            code=tuple(snippet for text in _CODE if (snippet := encoded(text))),
            text=tuple(snippet for text in _UNICODE if (snippet := encoded(text))),
            chats=tuple((framed(frame[0]), framed(frame[1])) for frame in frames if frame is not None),
        )


def _decoded(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    one_by_one = [[i] for i in ids]
    if backend := getattr(tokenizer, "backend_tokenizer", None):  # six times as fast
        return list(backend.decode_batch(one_by_one, skip_special_tokens=False))
    return list(tokenizer.batch_decode(one_by_one))


def _frame(tokenizer: Any, chat: Sequence[dict[str, str]]) -> tuple[str, str] | None:
    """What the chat template puts before and after the last turn; None: it has no such conversation."""
    messages = [{"content": _SENTINEL, **message} for message in chat]
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # jinja's or the template's own, as for a system turn it does not know
        return None
    before, found, after = rendered.partition(_SENTINEL)
    return (before, after) if found else None


def read_jsonl(path: str | Path, tokenizer: Any, max_len: int) -> Iterator[Prompt]:
    """Prompts of a JSONL file, one after the other: the file is never held as a whole.

    Each line is an object with ``prompt``, a text or a list of chat messages (rendered by the tokenizer's template
    with the generation prompt, as TRL does), or with ``prompt_ids``, token ids; other keys are passed over, empty
    lines too. Raises DataError with the line's number for anything else, and for 0 or more than ``max_len`` tokens.
    """
    path = Path(path)
    limit = len(tokenizer)
    try:
        with open_regular(path) as file:
            lines = bounded_lines(file, LONGEST_LINE)
            for number in count(1):
                try:
                    if (line := next(lines, None)) is None:
                        return
                    if not line.strip():
                        continue
                    prompt = _prompt(parse_json(line), tokenizer)
                    if not 1 <= len(prompt.ids) <= max_len:
                        raise ValueError(f"{len(prompt.ids)} tokens; expected 1 to {max_len}")
                    if bad := next((i for i in prompt.ids if not 0 <= i < limit), None):
                        raise ValueError(f"token id {bad}; expected 0 to {limit - 1}")
                except (ValueError, TypeError) as e:
                    raise DataError(f"{path}, line {number}: {e}. Correct the line, or leave it out.") from e
                yield prompt
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}. Expected a JSONL file of prompts.") from e


def _prompt(row: Any, tokenizer: Any) -> Prompt:
    if not isinstance(row, dict) or ("prompt" in row) == ("prompt_ids" in row):
        seen = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{seen or 'an empty object'}; expected an object with prompt, or with prompt_ids")
    if "prompt_ids" in row:
        ids = row["prompt_ids"]
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise ValueError(f"prompt_ids is {str(ids)[:40]!r}; expected a list of whole numbers")
        return Prompt(tuple(ids), "ids")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return Prompt(tuple(tokenizer(prompt)["input_ids"]), "text")
    if not isinstance(prompt, list) or not all(isinstance(m, dict) and "role" in m for m in prompt):
        raise ValueError(
            f"prompt is {str(prompt)[:40]!r}; expected a text or a list of messages with role and content"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("prompt is a conversation, and the tokenizer has no chat template; expected a text")
    try:
        rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    except Exception as e:  # jinja's or the template's own
        raise ValueError(f"the chat template refuses it ({type(e).__name__}: {e})") from e
    return Prompt(tuple(rendered["input_ids"]), "chat")
