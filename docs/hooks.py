"""What MkDocs can't do by itself: tables made of the code, and links that hold both in the repository and on the site.

- ``<!-- table: NAME -->`` becomes a table of what the package itself runs on (``tables.py``).
- The files of ``OUTSIDE``, which lie beside the code they are about, are pages too.
- A link to a file that is no page goes to that file on the repository's address.
- ``<!-- quoted from PATH -->`` before a block of code: the block stands in that file, ``...`` for what is left out.
- A path, a test, a module or an import named in code style that is not there is a warning, as is a quotation that is
  none: with ``--strict`` they end the build.
"""

from __future__ import annotations

import functools
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # the sources, not what may be installed

from tables import filled  # noqa: E402

logger = get_plugin_logger("trl-parity")

OUTSIDE = {  # file of the repository: page
    "CONTRIBUTING.md": "contributing/index.md",
    "CHANGELOG.md": "changelog.md",
    **{f"recipes/{name}/README.md": f"recipes/{name}.md" for name in ("grpo", "ppo", "server", "drill")},
}
_PAGE_OF = {f"docs/{page}": file for file, page in OUTSIDE.items()}  # where a page would lie: where it does

_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_QUOTE = re.compile(r"^<!-- quoted from (\S+) -->\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(
    r"((?:trl_parity|tests|benchmarks|recipes|configs|docs)/[\w./-]*\w\.\w+|test_\w+\.py)?(?:::(test_\w+).*)?"
)
_DOTTED = re.compile(r"trl_parity(?:\.\w+)+")
_IMPORT = re.compile(r"^\s*from (trl_parity[\w.]*) import ([\w, ]+)", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere."""
    for file, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put tables where they belong, and turn links that leave the site."""
    source = _PAGE_OF.get(f"docs/{page.file.src_uri}", f"docs/{page.file.src_uri}")
    if source != "CHANGELOG.md":  # which names what was
        _check_names(markdown, source)
        _check_quotations(markdown, source)

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        wanted = OUTSIDE.get(target) or target.removeprefix("docs/")
        if (target in OUTSIDE or target.startswith("docs/")) and files.get_file_from_path(wanted):
            to = posixpath.relpath(wanted, posixpath.dirname(page.file.src_uri))
        elif (ROOT / target).exists():
            to = f"{config.repo_url.rstrip('/')}/{'tree' if (ROOT / target).is_dir() else 'blob'}/main/{target}"
        else:
            logger.warning("%s links to %s, which is not there", source, match[1])
            to = match[1]
        return f"]({to}{match[2] or ''})"

    return filled(_LINK.sub(link, markdown))


def _check_quotations(text: str, source: str) -> None:
    """Warn of quoted code that its file no longer has."""
    for path, block in _QUOTE.findall(text):
        for part in re.split(r"^ *\.\.\.\n", block, flags=re.MULTILINE):
            if not (ROOT / path).exists() or part not in _read(ROOT / path):
                logger.warning("%s quotes what %s does not have: %s", source, path, part.strip().partition("\n")[0])


def _check_names(text: str, source: str) -> None:
    """Warn of paths, tests and modules in code style that do not exist."""
    last, prose = "", _FENCE.sub("", text)
    imports = [f"{module}.{name.strip()}" for module, names in _IMPORT.findall(text) for name in names.split(",")]
    for dotted in imports + [name for code in _CODE.findall(prose) for name in _DOTTED.findall(code)]:
        if not _resolves(dotted):
            logger.warning("%s names %s, which is not there", source, dotted)
    for code in _CODE.findall(prose):
        if (match := _PATH.fullmatch(code)) and any(match.groups()):
            last, test = match[1] or last, match[2]
            found = [ROOT / last] if "/" in last else list((ROOT / "tests").rglob(last))
            if not any(file.exists() and (not test or f"def {test}" in _read(file)) for file in found):
                logger.warning("%s names %s, which is not there", source, code)


@functools.cache
def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _resolves(dotted: str) -> bool:
    """Whether the sources have this module, or a module with this name in it. Nothing is imported."""
    at, *names = dotted.split(".")
    here = ROOT / at
    while names and ((here / names[0]).is_dir() or (here / f"{names[0]}.py").is_file()):
        here /= names.pop(0)
    file = here / "__init__.py" if here.is_dir() else here.with_suffix(".py")
    return not names or re.search(rf"\b{names[0]}\b", _read(file)) is not None
