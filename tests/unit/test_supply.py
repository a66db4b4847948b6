"""What is installed is what was pinned: hashes, the installers themselves, licences."""

import re

import pytest
from support import ROOT

LOCKS = ("requirements-cpu.lock", "requirements-ppo-cpu.lock", "requirements-docs.lock")
DEEPSPEED = "requirements-deepspeed.lock"  # beside the first

ENTRY = re.compile(r"^(\S+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)


def entries(lock):
    return ENTRY.findall((ROOT / lock).read_text())


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pinned_package_has_hashes(lock):
    left = ENTRY.sub("", (ROOT / lock).read_text())
    assert all(line.startswith("#") for line in left.splitlines()), left
    assert len(entries(lock)) > 30


def test_what_deepspeed_adds_to_the_stack_has_hashes_and_nothing_is_pinned_twice():
    assert all(line.startswith("#") for line in ENTRY.sub("", (ROOT / DEEPSPEED).read_text()).splitlines())
    assert {name for name, *_ in entries(DEEPSPEED)} == {"deepspeed", "hjson", "msgpack"}
    assert not {name for name, *_ in entries(DEEPSPEED)} & {name for name, *_ in entries(LOCKS[0])}


@pytest.mark.parametrize("lock", LOCKS[:2])
def test_uv_is_pinned_with_the_rest(lock):
    assert "uv" in {name for name, *_ in entries(lock)}


def test_every_install_of_the_makefile_requires_hashes_or_is_of_this_folder():
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    calls = [
        call for line in lines for call in re.split(r"\|\||&&|;", line) if "pip install" in call and "#" not in call
    ]
    assert len(calls) >= 8
    for call in calls:
        assert "--require-hashes" in call or call.endswith(("-e .", "dist/*.whl")), call


def test_licences_are_those_of_what_is_pinned():
    said = (ROOT / "THIRD_PARTY_LICENSES.md").read_text()
    listed = re.findall(r"^\| (\S+) \| (\S+) \| .+ \| (.+) \|$", said, re.MULTILINE)
    assert "not told" not in said
    assert "not installed" not in said
    for lock in (*LOCKS, DEEPSPEED):
        kind = lock.removeprefix("requirements-").removesuffix(".lock")
        assert {(n, v) for n, v, where in listed if kind in where.split(", ")} == {(n, v) for n, v, _ in entries(lock)}


def test_the_workflow_asks_for_known_vulnerabilities():
    assert "pip-audit" in (ROOT / ".github/workflows/ci.yml").read_text()
