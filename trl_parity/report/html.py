"""A report as one HTML file: no script, nothing loaded from anywhere, pictures inlined.

The words are the Markdown of ``trl_parity.report.summary``, rendered without raw HTML; tokens are escaped here.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .escape import visible

__all__ = ["render_page", "tokens_html"]

_SEQUENCES, _TOKENS, _PROMPT = 8, 2000, 400  # shown

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 860px; margin: 2em auto; padding: 0 1em; color: #1a1a1a;
  background: #fff; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; display: block; margin: 1em 0; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: .25em .6em; vertical-align: top; overflow-wrap: anywhere; }
pre { background: #f5f5f5; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
code { overflow-wrap: anywhere; }
.seq { font: 15px/2.1 ui-monospace, monospace; overflow-wrap: anywhere; border-left: 4px solid #ccc;
  padding: .2em .8em; margin: .6em 0; }
.seq .p { color: #555; } .seq .t { unicode-bidi: isolate; padding: .15em 1px; border-radius: 2px; }
.seq .less { border-bottom: 3px dashed #D55E00; } .seq .more { border-bottom: 3px solid #0072B2; }
.seq .odd { border: 2px dotted #000; }
"""


def render_page(title: str, parts: Sequence[str], pictures: Mapping[str, bytes]) -> str:
    """A whole document. ``parts``: Markdown, or HTML of ``tokens_html``, which begins with ``<``.

    Raises ImportError without markdown-it-py (rich brings it).
    """
    from markdown_it import MarkdownIt

    md = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    plain_image = md.renderer.rules["image"]  # type: ignore[attr-defined]

    def image(tokens: Any, index: int, options: Any, env: Any) -> str:
        png = pictures.get(str(tokens[index].attrs.get("src")))
        if png is None:  # no other address is ever loaded
            return html.escape(tokens[index].content)
        tokens[index].attrs["src"] = "data:image/png;base64," + base64.b64encode(png).decode()
        return str(plain_image(tokens, index, options, env))

    md.renderer.rules["image"] = image  # type: ignore[attr-defined]
    md.validateLink = lambda url: url in pictures  # type: ignore[method-assign]
    body = "\n".join(part if part.startswith("<") else md.render(part) for part in parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(visible(title))}'
        f'</title>\n<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n'
        "</body>\n</html>\n"
    )


def tokens_html(rows: Sequence[Mapping[str, Any]], redacted: bool) -> str:
    """The worst sequences as running text, each token coloured by its Δ; hovering tells its numbers."""
    by_sequence: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_sequence.setdefault(row["sequence"], []).append(row)
    if not by_sequence:
        return "<h2>Worst sequences</h2>\n<p>No tokens were kept.</p>"
    scale = color_scale(rows)
    less, more = _span("trainer gives less", -scale, scale, ""), _span("trainer gives more", scale, scale, "")
    out = [
        "<h2>Worst sequences</h2>",
        f'<p>The worst {min(_SEQUENCES, len(by_sequence))} of {len(by_sequence)} kept. Δ = trainer - rollout '
        f'log-prob. <span class="seq" style="border:0;padding:0;margin:0">{less} {more}</span>; the fuller the '
        f'colour, the larger |Δ|, full from '
        f"{scale:.3g} nats on; underlined from half of that. Point at a token for its numbers."
        + (" Text and ids are redacted: a dot a token." if redacted else "") + "</p>",
    ]  # fmt: skip
    for sequence, tokens in list(by_sequence.items())[:_SEQUENCES]:
        known = [abs(t["log_ratio"]) for t in tokens if _finite(t)]
        total = f"sum |Δ| {sum(known):.4g} over {len(known):,} compared tokens"
        out.append(f"<h3>Sequence {int(sequence)}: {total}</h3>")
        prompt = "" if redacted else str(tokens[0].get("prompt") or "")
        cut = "…" if len(prompt) > _PROMPT else ""
        spans = [f'<span class="p">{cut}{html.escape(visible(prompt[-_PROMPT:]))}</span> '] if prompt else []
        for t in tokens[:_TOKENS]:
            text = "·" if redacted else visible(str(t.get("token") or ""))
            said = f"position {t['position']}, Δ {_figure(t['log_ratio'], '+.4g')}, rollout " + (
                f"{_figure(t['rollout_logprob'])}, trainer {_figure(t['trainer_logprob'])}, entropy "
                f"{_figure(t.get('entropy'))}" + ("" if t["compared"] else ", not compared")
            )
            spans.append(_span(text, t["log_ratio"] if t["compared"] else None, scale, said))
        beyond = len(tokens) - _TOKENS
        spans += [f" … {beyond:,} more tokens"] if beyond > 0 else []
        out.append(f'<div class="seq">{"".join(spans)}</div>')
    return "\n".join(out)


def color_scale(rows: Sequence[Mapping[str, Any]]) -> float:
    """|Δ| of the full colour: its 95th percentile over the tokens at hand."""
    sizes = sorted(abs(row["log_ratio"]) for row in rows if _finite(row))
    return max(sizes[int(0.95 * (len(sizes) - 1))], 1e-6) if sizes else 1.0


def _finite(row: Mapping[str, Any]) -> bool:
    return bool(row["compared"]) and row["log_ratio"] is not None and math.isfinite(row["log_ratio"])


def _span(text: str, delta: float | None, scale: float, title: str) -> str:
    """A token: orange and dashed where the trainer gives less, blue and solid where more."""
    classes, style = "t", ""
    if delta is not None and not math.isfinite(delta):
        classes += " odd"
    elif delta is not None:
        share = min(1.0, abs(delta) / scale)
        colour = "213,94,0" if delta < 0 else "0,114,178"
        style = f' style="background:rgba({colour},{0.45 * share:.2f})"'
        classes += (" less" if delta < 0 else " more") if share >= 0.5 else ""
    told = f' title="{html.escape(visible(title), quote=True)}"' if title else ""
    return f'<span class="{classes}"{style}{told}>{html.escape(text)}</span>'


def _figure(value: Any, form: str = ".4g") -> str:
    return "-" if value is None else format(float(value), form)
