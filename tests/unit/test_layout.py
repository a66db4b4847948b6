"""The tests mirror the package, and share only what lies in ``support``."""

import ast

import pytest
from support import ROOT, TESTS


def imported(path):
    """Modules that a file imports, also in the code that it holds as text."""
    trees = [ast.parse(path.read_text())]
    for node in ast.walk(trees[0]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            try:
                trees.append(ast.parse(node.value))
            except (SyntaxError, ValueError):
                continue
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.slow_unit
def test_no_test_imports_another():
    for path in TESTS.rglob("*.py"):
        found = [name for name in imported(path) if name.split(".")[-1].startswith("test_") or name == "conftest"]
        assert not found, (path, found)


def test_unit_tests_lie_in_folders_of_the_package():
    folders = {p.name for p in (ROOT / "trl_parity").iterdir() if p.is_dir()}
    ours = {p.name for p in (TESTS / "unit").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert ours <= folders, ours - folders


def test_support_imports_no_test_tool_that_a_child_lacks():
    """Children import it too: at the top of ``support`` there is no engine and no trainer."""
    for name in imported(TESTS / "support" / "__init__.py"):
        assert name in {"os", "sys", "tempfile", "pathlib"}, name


def test_a_reader_can_hold_a_file_and_the_first_floor():
    package = ROOT / "trl_parity"
    assert len(list(package.glob("*.py"))) <= 12
    assert len([p for p in package.iterdir() if p.is_dir() and (p / "__init__.py").exists()]) <= 14
    long = {path.name: n for path in package.rglob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long
