"""A report as one HTML file: no script, nothing loaded from anywhere, pictures inlined.

The words are the Markdown of ``trl_parity.report.markdown``, rendered without raw HTML; tokens have a template.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from .format import number
from .rendering import Markup, render_html
from .sequences import LESS, Shade, color_scale, shade, worst_sequences

__all__ = ["render_page", "tokens_html"]

_SEQUENCES, _TOKENS, _PROMPT = 8, 2000, 400  # shown


def render_page(title: str, parts: Sequence[str], pictures: Mapping[str, bytes]) -> str:
    """A whole document. ``parts``: Markdown, or HTML as ``Markup``."""
    from markdown_it import MarkdownIt

    md = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    plain_image = md.renderer.rules["image"]  # type: ignore[attr-defined]

    def image(tokens: Any, index: int, options: Any, env: Any) -> str:
        png = pictures.get(str(tokens[index].attrs.get("src")))
        if png is None:  # no other address is ever loaded
            return str(Markup.escape(tokens[index].content))
        tokens[index].attrs["src"] = "data:image/png;base64," + base64.b64encode(png).decode()
        return str(plain_image(tokens, index, options, env))

    md.renderer.rules["image"] = image  # type: ignore[attr-defined]
    md.validateLink = lambda url: url in pictures  # type: ignore[method-assign]
    body = [part if isinstance(part, Markup) else Markup(md.render(part)) for part in parts]
    return str(render_html("page.html.j2", title=title, parts=body))


def tokens_html(rows: Sequence[Mapping[str, Any]], redacted: bool) -> Markup:
    """The worst sequences as running text, each token coloured by its Δ; hovering tells its numbers."""
    worst = worst_sequences(rows)
    scale = color_scale(rows)
    sequences = []
    for one in worst[:_SEQUENCES]:
        prompt = "" if redacted else one.prompt
        sequences.append(
            {
                "number": one.number,
                "total": one.total,
                "prompt": ("…" if len(prompt) > _PROMPT else "") + prompt[-_PROMPT:],
                "tokens": [_token(t, scale, redacted) for t in one.tokens[:_TOKENS]],
                "beyond": len(one.tokens) - _TOKENS,
            }
        )
    less, more = (
        {"text": f"trainer gives {what}", "title": "", **_look(shade({"compared": True, "log_ratio": delta}, 1.0))}
        for what, delta in (("less", -1.0), ("more", 1.0))
    )
    return render_html(
        "sequences.html.j2", sequences=sequences, kept=len(worst), scale=scale, redacted=redacted, less=less, more=more
    )


def _token(token: Mapping[str, Any], scale: float, redacted: bool) -> dict[str, str]:
    known = [number(token.get(name)) for name in ("rollout_logprob", "trainer_logprob", "entropy")]
    said = f"position {token['position']}, Δ {number(token['log_ratio'], '+.4g')}"
    said += "".join(f", {name} {value}" for name, value in zip(("rollout", "trainer", "entropy"), known, strict=True))
    text = "·" if redacted else str(token.get("token") or "")
    title = said + ("" if token["compared"] else ", not compared")
    return {"text": text, "title": title, **_look(shade(token, scale))}


def _look(seen: Shade | None) -> dict[str, str]:
    """Orange and dashed where the trainer gives less, blue and solid where more."""
    if seen is None:
        return {"classes": "t", "color": ""}
    if not seen.finite:
        return {"classes": "t odd", "color": ""}
    line = ("less" if seen.color == LESS else "more") if seen.marked else ""
    return {
        "classes": f"t {line}".rstrip(),
        "color": ",".join(str(c) for c in (*seen.color, f"{0.45 * seen.share:.2f}")),
    }
