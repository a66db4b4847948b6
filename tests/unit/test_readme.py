"""Commands in README and docs can be typed as they stand."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*/README.md")),
         *sorted((ROOT / "recipes").glob("*/train.py")), *sorted((ROOT / "trl_parity" / "cli").glob("*.py")),
         *sorted((ROOT / "configs").glob("*.yaml"))]  # fmt: skip


def lines(start):
    """Commands that begin so, by page."""
    for page in PAGES:
        for line in re.findall(rf"(?<![`\w]){start}[^\n`]*", page.read_text()):
            yield page, line


def test_what_pip_is_told_to_install_is_a_requirement_or_a_folder_with_extras_we_have():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    asked = [re.search(r"""install ['"]([^'"]+)['"]""", line) for _, line in lines("pip install")]
    asked = [match[1] for match in asked if match]
    assert ".[vllm,wandb]" in asked
    for text in asked:
        folder = re.fullmatch(r"\.\[([\w,]+)\]", text)
        wanted = set(folder[1].split(",")) if folder else Requirement(text).extras
        assert wanted <= extras, text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_accelerate_launch_line_stops_at_a_taken_port(page):
    """accelerate looks at port 29500 where it starts several processes, and takes another one if told 0."""
    told = [line for at, line in lines("accelerate launch") if at == page and ("/train.py" in line or " -m " in line)]
    assert all("--num_processes 1" in line or "--main_process_port 0" in line for line in told), told


def test_the_first_screen_of_the_readme_makes_a_halted_job_fail():
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    assert "trainer.train()\nparity.raise_if_halted()" in first


def test_the_demos_time_stands_in_one_place():
    timed = re.compile(r"make demo`[^.\n]*?\d+ (?:min|s)\b")
    assert [page.name for page in PAGES if timed.search(page.read_text())] == ["README.md"]
    assert timed.search((ROOT / "README.md").read_text())
