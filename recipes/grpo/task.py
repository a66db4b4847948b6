"""The task of the recipe: sort a handful of characters, after some free words that nobody grades.

A prompt shows distinct characters (``sort 83052:``). The completion may say anything it likes, then ``=`` and its
answer: ``fox mint oak = 02358``. Only what follows the last ``=`` is graded. The ungraded words are there for a
reason: GRPO sharpens what it rewards, and a policy without entropy hides the drift between engine and trainer. The
words keep their entropy while the answer gets better.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

from datasets import Dataset

DIGITS = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyz"

_WORDS = """
ash bay bee cod cup dew dot eel egg elm fan fig fog fox gem gum hat hut ice ink ivy jam jar jet keg kit lab lid map
mud nut oak owl pin ray sea sky sun tea urn van wax yak zip bark cave dune fern glow hill isle kelp leaf mint moss
nest opal pond quay reed sand tide vine wolf yarn
"""
WORDS = _WORDS.split()

CHAT_PROMPT = (
    "Sort these characters in ascending order: {item}\n"
    "Say a few words about how you do it, then end with an equals sign and the sorted characters, "
    "for example: = {example}"
)


def expected_answer(item: str) -> str:
    """The characters of ``item`` in ascending order."""
    return "".join(sorted(item))


def is_eval_item(item: str) -> bool:
    """Whether an item belongs to the held-out eighth. A hash decides, so the splits never meet, whatever the seed."""
    return zlib.crc32(item.encode()) % 8 == 0


def items(seed: int, split: str, *, length: int = 5, alphabet: str = DIGITS) -> Iterator[str]:
    """Endless items of one split, each ``length`` distinct characters; the same seed gives the same items."""
    if split not in ("train", "eval"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'eval'")
    if not 1 <= length <= len(alphabet):
        raise ValueError(f"length is {length}; expected 1 to {len(alphabet)} (the characters are distinct)")
    rng = random.Random(f"{split}-{seed}")
    while True:
        item = "".join(rng.sample(alphabet, length))
        if is_eval_item(item) == (split == "eval"):
            yield item


def text_prompt(item: str) -> str:
    """The prompt of the tiny model: ``sort 83052:``."""
    return f"sort {item}:"


def chat_prompt(item: str) -> list[dict[str, str]]:
    """The same question for a chat model, as a conversation with one user turn."""
    example = expected_answer(item[::-1][: max(1, len(item) // 2)])
    return [{"role": "user", "content": CHAT_PROMPT.format(item=" ".join(item), example=example)}]


def make_dataset(
    n: int, seed: int, split: str, *, length: int = 5, alphabet: str = DIGITS, chat: bool = False
) -> Dataset:
    """``n`` rows with the columns ``prompt`` (text, or a conversation with ``chat=True``) and ``answer``."""
    source = items(seed, split, length=length, alphabet=alphabet)
    chosen = [next(source) for _ in range(n)]
    return Dataset.from_dict(
        {
            "prompt": [chat_prompt(item) if chat else text_prompt(item) for item in chosen],
            "answer": [expected_answer(item) for item in chosen],
        }
    )


def extract_answer(completion: str | list[dict[str, str]]) -> str | None:
    """What follows the last ``=``, letters and digits only, in lower case; None when there is no ``=``."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    _, marker, tail = text.rpartition("=")
    return "".join(c for c in tail.lower() if c.isalnum()) if marker else None


def exact(completions: list, answer: list[str], **_: object) -> list[float]:
    """1 where the answer is right, else 0. Its mean is the accuracy."""
    return [float(extract_answer(c) == a) for c, a in zip(completions, answer, strict=True)]


def closeness(completions: list, answer: list[str], **_: object) -> list[float]:
    """Partial credit: the share of positions that hold the right character.

    0 without an ``=``; an answer longer than the right one is measured against its own length, so padding it out
    earns nothing.
    """
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        given = extract_answer(completion) or ""
        hits = sum(g == r for g, r in zip(given, right, strict=False))
        scores.append(hits / max(len(given), len(right)))
    return scores
