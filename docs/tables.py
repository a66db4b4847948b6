"""Tables of the docs, made of what the package itself runs on, so that none can be stale.

A page has ``<!-- table: NAME ARGUMENTS -->`` where one belongs; ``filled`` puts it there. Needs the package alone.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import trl_parity
from trl_parity.causes import CAUSES
from trl_parity.cli import COMMANDS
from trl_parity.config.parity import ParityConfig
from trl_parity.config.rules import DEFAULT_RULES, Rule
from trl_parity.metrics.scalars import SCALARS

_TABLE = re.compile(r"<!-- table: (\w+) ?(.*?) -->")


def filled(markdown: str) -> str:
    """A page with its tables."""
    return _TABLE.sub(lambda match: TABLES[match[1]](*match[2].split()), markdown)


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _scalars(*wanted: str) -> str:
    """Scalars by name, by what their names begin with before a / or _, or (``seq/``) by folder."""
    found = [
        name
        for name in SCALARS
        if any(name == w or name.startswith((w,) if w.endswith("/") else (f"{w}/", f"{w}_")) for w in wanted)
    ]
    return _rows(["scalar", "formula"], [[f"`{name}`", _literal(SCALARS[name])] for name in found])


def _settings() -> str:
    rows, types = [], get_type_hints(ParityConfig, include_extras=True)
    for field in fields(ParityConfig):
        text = _literal(field.metadata["help"])
        for bound in getattr(types[field.name], "__metadata__", ()):
            text += f" Expected: {bound.expected}."
        if choices := field.metadata.get("choices"):
            text += f" One of: {', '.join(f'`{choice}`' for choice in choices)}."
        rows.append([f'<span id="{field.name}"></span>`{field.name}`', f"`{field.default!r}`", text])
    return _rows(["setting", "default", "what it does"], rows)


def _rules() -> str:
    keys = [f.name for f in fields(Rule) if f.name != "stat" and any(_set(rule, f) for rule in DEFAULT_RULES)]
    by_name = {f.name: f for f in fields(Rule)}
    rows = [
        [f"`{rule.stat}`", *(f"{getattr(rule, k)!r}" if _set(rule, by_name[k]) else "" for k in keys)]
        for rule in DEFAULT_RULES
    ]
    return _rows(["statistic", *(f"`{key}`" for key in keys)], rows)


def _set(rule: Rule, field: Any) -> bool:
    return field.default is MISSING or getattr(rule, field.name) != field.default


def _causes() -> str:
    texts = []
    for name, cause in CAUSES.items():
        what, harm, fix = (_literal(text) for text in (cause.what, cause.harm, cause.fix))
        texts.append(f"## `{name}` {{ #{name} }}\n\n{what}\n\n**Harm:** {harm}\n\n**Fix:** {fix}")
    return "\n\n".join(texts)


def _literal(text: str) -> str:
    """A sentence of the terminal in Markdown: what it must not read as markup."""
    return re.sub(r"([*<])", r"\\\1", text)


def _api() -> str:
    names = sorted((n for n in trl_parity.__all__ if not n.startswith("_")), key=lambda n: not n.startswith("Parity"))
    return "\n\n".join(
        f"::: {name}" for name in [*(f"trl_parity.{name}" for name in names), "trl_parity.ppo.use_vllm"]
    )


def _commands() -> str:
    os.environ["COLUMNS"] = "100"
    texts = []
    for name in COMMANDS:
        module = importlib.import_module(f"trl_parity.cli.{name}")
        parser = argparse.ArgumentParser(
            prog=f"trl-parity {name}",
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        texts.append(f"## trl-parity {name}\n\n```text\n{parser.format_help().rstrip()}\n```")
    return "\n\n".join(texts)


TABLES = {
    "api": _api,
    "causes": _causes,
    "commands": _commands,
    "rules": _rules,
    "scalars": _scalars,
    "settings": _settings,
}
