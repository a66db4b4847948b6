"""``trl-parity drill``: the real stack broken on purpose."""

import pytest
from support import ROOT

from trl_parity.causes import CAUSES
from trl_parity.cli import main


@pytest.fixture
def drills(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "drill"))
    import drills

    return drills


def test_list_shows_every_drill_and_its_cause(capsys, drills, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["drill", "--list"]) == 0
    shown = capsys.readouterr().out
    for drill in drills.DRILLS:
        line = next(line for line in shown.splitlines() if line.startswith(f"{drill.name} "))
        assert (drill.cause or "none") in line


def test_drills_name_causes_the_package_knows(drills):
    assert {drill.cause for drill in drills.DRILLS} - {""} <= set(CAUSES)
    assert len({drill.name for drill in drills.DRILLS}) == len(drills.DRILLS)
    assert [drill.name for drill in drills.DRILLS if not drill.cause] == ["control"]


def test_an_unknown_name_suggests_the_nearest(capsys):
    assert main(["drill", "lost_sink"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("trl-parity: no drill is called 'lost_sink'. Did you mean 'lost-sync'?")


def test_without_a_name_it_says_what_to_do(capsys):
    assert main(["drill"]) == 2
    assert "--list" in capsys.readouterr().err


def test_an_installed_package_without_the_repository_says_to_clone_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("trl_parity.cli.drill.__file__", str(tmp_path / "site" / "trl_parity" / "cli" / "drill.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["drill", "--list"]) == 2
    assert "Clone the repository" in capsys.readouterr().err
    monkeypatch.chdir(ROOT)
    assert main(["drill", "--list"]) == 0


@pytest.mark.parametrize("healthy", [True, False])
def test_what_counts_as_passed(drills, healthy):
    import run

    row = {"cause": "" if healthy else "temperature", "correct": True, "detected": not healthy}
    assert run.passed(row)
    assert not run.passed(row | {"detected": healthy})
    assert not run.passed(row | {"correct": False})
