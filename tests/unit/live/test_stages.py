"""Whatever of ours fails, on whatever rank: training ends as it would, nobody hangs, and nothing passes for health."""

import json

import pytest
from support import stages
from support.processes import run_on_two_ranks

from trl_parity.live.stages import STAGES, Kind


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    stages.prepare(monkeypatch.setattr)


@pytest.fixture
def usual(tmp_path):
    """The run in which nothing fails."""
    with stages.failing("", seen := []):
        done = stages.run(tmp_path / "usual")
    assert done.statuses == ["OK", "OK", "HALT", "HALT", "OK", "OK", "OK", "OK"]
    assert done.updates == [True, True, False, False, True, True]
    done.seen = set(seen)
    return done


def check(name, done, usual):
    """What may become of a run in which a stage always fails."""
    kind = STAGES[name]
    if kind is Kind.TELLING and name != "noise floor":
        assert (done.statuses, done.updates) == (usual.statuses, usual.updates), name
        return
    assert "OK" not in done.statuses, (name, done.statuses)  # missing is not healthy
    if kind is Kind.MEASURING or name in ("statistics", "verdict"):
        assert set(done.statuses) == {"ERROR"}, (name, done.statuses)
    else:  # without a floor
        assert set(done.statuses) <= {"ERROR", "CALIBRATING", "HALT"}, (name, done.statuses)


@pytest.mark.slow_unit
def test_a_run_goes_through_every_stage_and_each_may_fail(tmp_path, usual):
    assert usual.seen == set(STAGES)
    for name in STAGES:
        with stages.failing(name):
            check(name, stages.run(tmp_path / name), usual)


ALLOWED = {
    "live/callback.py:ParityCallback._require_interception",  # raises by its nature
}


@pytest.mark.slow_unit
def test_no_function_of_ours_takes_a_run_down_or_lets_it_pass_for_healthy(tmp_path, usual):
    """Not by what the code says of itself: each function that another of ours calls in a run is made to raise."""
    found = []
    with stages.traced(lambda name: found.append(name)):
        stages.run(tmp_path / "found")
    died = []
    for i, name in enumerate(dict.fromkeys(found)):
        hits = []

        def fail(called, name=name, hits=hits):
            if called == name:
                hits.append(called)
                raise RuntimeError(f"{name} made to fail")

        try:
            with stages.traced(fail):
                done = stages.run(tmp_path / str(i))
        except Exception as e:
            died.append(f"{name}: {type(e).__name__}: {e}")
            continue
        if not all(s == was or s in ("ERROR", "CALIBRATING", "NO_DATA") or was == "OK"
                   for s, was in zip(done.statuses, usual.statuses, strict=True)):  # fmt: skip
            died.append(f"{name}: {done.statuses}")
    assert [line for line in died if line.split(": ")[0] not in ALLOWED] == []


RANKS = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from support import stages
from trl_parity.collectives import gather_rows
from trl_parity.live.stages import STAGES

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
rank = accelerator.process_index
stages.prepare()
out, told = Path(sys.argv[1]), {}
for name in ["", *STAGES]:
    for bad in (0, 1) if name else (0,):
        with stages.failing(name if rank == bad else ""):
            done = stages.run(out / f"{name}{bad}", accelerator)
        row = {"statuses": done.statuses, "updates": done.updates, "diagnosed": done.callback.diagnosis is not None}
        both = gather_rows([row])  # nobody is left behind, and in no other gathering
        assert both[0] == both[1], (name, bad, both)
        told[f"{name}/{bad}"] = row
if rank == 0:
    (out / "told.json").write_text(json.dumps(told))
"""


@pytest.mark.slow_unit
def test_every_stage_may_fail_on_either_of_two_ranks(tmp_path):
    run_on_two_ranks(RANKS, tmp_path, tmp_path, ACCELERATE_USE_CPU="true")
    told = json.loads((tmp_path / "told.json").read_text())
    usual = told.pop("/0")
    assert usual["statuses"] == ["OK", "OK", "HALT", "HALT", "OK", "OK", "OK", "OK"]
    assert usual["diagnosed"]
    assert len(told) == 2 * len(STAGES)
    for key, row in told.items():
        name = key.split("/")[0]
        if STAGES[name] is Kind.TELLING:  # the floor's sources of the other rank are enough
            assert {**row, "diagnosed": True} == usual, key
            assert row["diagnosed"] == (name != "diagnosis"), key
        elif name in ("statistics", "verdict"):
            assert set(row["statuses"]) == {"ERROR"}, (key, row)
        elif STAGES[name] is Kind.MEASURING:  # what the other rank sees is breached all the same
            assert row["statuses"] == ["ERROR", "ERROR", "HALT", "HALT", *["ERROR"] * 4], (key, row)
            assert row["updates"] == [True, True, *[False] * 4], (key, row)
            assert row["diagnosed"] == (name == "policy drift"), (key, row)
        else:
            assert row["statuses"][0] == "ERROR", (key, row)
