"""The templates beside this file, as Markdown and as HTML: what is filled in is escaped, unless a filter did it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .escape import code, fenced, prose, visible
from .format import number, percent

__all__ = ["Markup", "render_html", "render_markdown", "sections"]


def render_markdown(template: str, **values: Any) -> str:
    """A Markdown template, filled in: text as ``prose``; ``code`` and ``fenced`` are filters."""
    return _environments()[0].get_template(template).render(values)


def render_html(template: str, **values: Any) -> Markup:
    """An HTML template, filled in. ``Markup`` stays as it is."""
    return Markup(_environments()[1].get_template(template).render(values))


def sections(template: str, *names: str, **values: Any) -> tuple[str, ...]:
    """Macros of a Markdown template, each rendered for itself."""
    module = _environments()[0].get_template(template).make_module(values)
    return tuple(str(getattr(module, name)()) for name in names)


@cache
def _environments() -> tuple[Environment, Environment]:
    markdown, html = (
        Environment(
            loader=FileSystemLoader(Path(__file__).with_name("templates")),
            autoescape=True,
            finalize=lambda value, escape=escape: value if hasattr(value, "__html__") else escape(value),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        # what comes out of these is escaped once more as HTML, which leaves Markup as it is
        for escape in (lambda value: Markup(prose(value)), visible)
    )
    for environment in (markdown, html):
        environment.filters |= {"number": number, "percent": percent}
    markdown.filters |= {
        "code": lambda value: Markup(code(value)),
        "fenced": lambda value: Markup(fenced(value)),
    }
    return markdown, html
