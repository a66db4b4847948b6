"""Whatever a model, a tokenizer or a library wrote is hostile until escaped: for terminals, Markdown and HTML."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

__all__ = ["code", "fenced", "one_line", "prose", "visible"]

_BLANKS = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # printable to Python, but without a shape


def visible(text: Any) -> str:
    """One line without control, format or shapeless characters: those as escapes (``\\n``, ``\\u200b``)."""
    return "".join(
        c.encode("unicode_escape").decode()
        if not c.isprintable() or c in _BLANKS or (i == 0 and unicodedata.category(c)[0] == "M")
        else c
        for i, c in enumerate(str(text))
    )


def one_line(text: Any) -> str:
    """The same with line breaks and runs of blanks as single blanks."""
    return visible(" ".join(str(text).split()))


def prose(text: Any) -> str:
    """Text within a Markdown paragraph or table cell, anywhere but at the start of a line."""
    return re.sub(r"([\\`*<|~$]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|&(?=#?\w+;))", r"\\\1", one_line(text))


def code(text: Any) -> str:
    """A code span, also within a table cell; '-' for nothing."""
    line = visible(text).replace("|", "\\|")
    if not line.strip():
        return "-"
    tick = "`" * (_longest_ticks(line) + 1)
    pad = " " if line[0] in "` " or line[-1] in "` " else ""
    return f"{tick}{pad}{line}{pad}{tick}"


def fenced(text: str) -> str:
    """A code block that nothing in it can end."""
    lines = [visible(line) for line in text.split("\n")]
    fence = "`" * max(3, *(_longest_ticks(line) + 1 for line in lines))
    return "\n".join([fence, *lines, fence])


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
