"""When a cause is asked for."""

import os

import pytest
from support.incidents import make

from trl_parity import ParityConfig
from trl_parity.live.incidents import Investigator
from trl_parity.report.bundle import write_incident
from trl_parity.results.incident import prune_incidents
from trl_parity.verdict import Status, Verdict


def asked(statuses, named_by=(), **settings):
    """Steps at which a diagnosis is due. ``named_by``: steps whose diagnosis names a cause."""
    investigator = Investigator(ParityConfig(**settings))
    steps = []
    for step, status in enumerate(statuses, start=1):
        verdict = Verdict(step=step, status=Status(status), streak=0, warnings=("kl_k3",))
        if investigator.due(verdict):
            steps.append(step)
            investigator._named = step in named_by
    return steps


@pytest.mark.parametrize(
    ("statuses", "named_by", "steps"),
    [
        (["BREACH", "BREACH", *["HALT"] * 7], (), [1, 3]),  # a lasting fault that nothing explains
        (["BREACH", "BREACH", *["HALT"] * 7], (1,), [1]),
        (["HALT"] * 5, (), [1]),
        (["BREACH", "HALT", "WARN", "NO_DATA", "ERROR", "HALT", "OK", "BREACH", "HALT", "HALT"], (), [1, 2, 8, 9]),
        (["BREACH", "CALIBRATING", "BREACH"], (), [1]),  # the same episode
        (["OK", "WARN", "NO_DATA", "ERROR", "OK"], (), []),
    ],
)
def test_a_cause_is_asked_for_twice_an_episode_at_most(statuses, named_by, steps):
    assert asked(statuses, named_by, action="log") == steps


def test_an_intermittent_fault_is_one_episode_and_its_halt_asks_again():
    """What was named before a healthy window may be another fault's."""
    investigator, steps = Investigator(ParityConfig(action="log")), []
    for step, status in enumerate(["BREACH", "OK", "BREACH", "OK", "HALT", "OK", "HALT"], start=1):
        if investigator.due(Verdict(step=step, status=Status(status), streak=0, level=1.0)):
            steps.append(step)
            investigator._named = True
    assert steps == [1, 5]


def test_an_episode_leaves_one_incident_of_a_breach():
    investigator = Investigator(ParityConfig(diagnose="never"))
    left = []
    statuses = ["OK", "WARN", "BREACH", "BREACH", "HALT", "WARN", "BREACH", "OK", "OK", "BREACH", "OK", "HALT"]
    for step, status in enumerate(statuses, start=1):
        verdict = Verdict(step=step, status=Status(status), streak=0, level=1.0 if step == 8 else 0.0)
        investigator.due(verdict)
        if investigator.leaves(verdict):
            left.append(step)
    assert left == [3, 10]


def incident_of(folder, step, status, size=0):
    home = write_incident(folder, make(step=step, verdict={"status": status}, windows=[]), [], pictures=False)
    (home / "more").write_bytes(b"x" * size)
    os.utime(home / "incident.json", (step, step))
    return home


def test_incidents_are_capped_in_number_breaches_before_halts_the_oldest_first(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_parity.results.incident.MOST_INCIDENTS", 4)
    kinds = ["HALT", "BREACH", "HALT", "BREACH", "BREACH", "HALT", "BREACH"]
    for step, status in enumerate(kinds, start=1):
        prune_incidents(tmp_path, keep=incident_of(tmp_path, step, status))
    assert sorted(path.name for path in (tmp_path / "incidents").iterdir()) == ["step-1", "step-3", "step-6", "step-7"]
    for step in (8, 9):
        prune_incidents(tmp_path, keep=incident_of(tmp_path, step, "HALT"))
    # the first halt stays
    assert sorted(path.name for path in (tmp_path / "incidents").iterdir()) == ["step-1", "step-6", "step-8", "step-9"]


def test_incidents_are_capped_in_bytes_and_what_is_none_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_parity.results.incident.MOST_BYTES", 100_000)
    large, small = incident_of(tmp_path, 1, "BREACH", 90_000), incident_of(tmp_path, 2, "BREACH")
    other = tmp_path / "incidents" / "step-notes"
    other.mkdir()
    (other / "mine.txt").write_text("x" * 200_000)
    (tmp_path / "incidents" / "step-0").symlink_to(other, target_is_directory=True)
    kept = incident_of(tmp_path, 3, "BREACH", 200_000)
    prune_incidents(tmp_path, keep=kept)
    assert not large.exists()
    assert not small.exists()
    assert {path.name for path in (tmp_path / "incidents").iterdir()} == {"step-notes", "step-0", "step-3"}


def test_from_a_warning_on_where_that_is_set_and_never_where_that_is():
    assert asked(["WARN", "WARN", "BREACH", "HALT", "HALT"], diagnose="warn") == [1, 4]
    assert asked(["BREACH", "HALT"], diagnose="never") == []


def test_one_wanted_by_name_is_made_once_even_if_it_fails():
    investigator = Investigator(ParityConfig())
    investigator.wanted = True
    ok = Verdict(step=1, status=Status.OK, streak=0)
    assert [investigator.due(ok), investigator.due(ok)] == [True, False]
