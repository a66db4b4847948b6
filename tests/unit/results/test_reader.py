"""What is kept of a line, of a bundle and of a run, whatever stands in their files."""

import json
import os
import tracemalloc

import pyarrow
import pytest
from pyarrow import parquet
from support.incidents import make
from support.windows import window

from trl_parity import ParityConfig
from trl_parity.live.judge import RunJudge
from trl_parity.preflight.pilot import judge_pilot
from trl_parity.report.bundle import write_incident
from trl_parity.report.summary import _tokens, summarize
from trl_parity.results.reader import samples, window_of
from trl_parity.verdict import Status, Verdict


def line(**more):
    verdict = Verdict(step=3, status=Status.WARN, streak=1, warnings=("kl_k3",), stats=window(kl_k3=0.5))
    return json.dumps(verdict.to_dict() | {"schema_version": 2} | more).encode()


def test_of_a_line_what_is_ours_is_kept_and_nothing_else():
    plain = window_of(line())
    assert plain["kl_k3"] == 0.5
    assert (plain["warnings"], plain["breaker/status"], plain["schema_version"]) == (["kl_k3"], 1, 2)
    foreign = {f"foreign/{i}": "x" * 100 for i in range(1000)} | {"evidence": [1.0] * 1000}
    assert window_of(line(**foreign)) == plain
    long = window_of(line(reason="r" * 10**6, alert="a" * 10**6, status="s" * 10**6, num_tokens=[0] * 1000))
    assert len(json.dumps(long)) < 40_000


def test_of_a_sample_no_more_tokens_are_kept_than_are_shown(tmp_path):
    columns = {name: [1.0] * 50_000 for name in ("position", "rollout_logprob", "trainer_logprob", "entropy")}
    (tmp_path / "metrics.jsonl").write_bytes(line() + b"\n")
    rows = json.dumps({"schema_version": 1, "step": 1, "status": "OK", **columns}) + "\n"
    (tmp_path / "tokens.jsonl").write_text(rows * 3)
    before, after = samples(tmp_path / "metrics.jsonl", None)
    assert (before.windows, len(before), len(after)) == (3, 3 * 4096, 0)


@pytest.mark.slow_unit
def test_a_pilot_keeps_no_window(tmp_path):
    row = line() + b"\n"
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        file.writelines(row for _ in range(4000))
    tracemalloc.start()
    judge_pilot(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000  # a window alone takes 10 KB
    tracemalloc.stop()


@pytest.mark.slow_unit
def test_the_newest_incident_is_that_of_the_largest_step(tmp_path):
    judge = RunJudge(ParityConfig(), measured_floor=False)
    judge.open(tmp_path, [])
    judge.judge(12, judge.scalars(window(kl_k3=1e-5)))
    judge.close()
    for step in (9, 12, 12, 2):  # a copy may have any times
        folder = write_incident(tmp_path / "parity", make(step=step, windows=[]), [], pictures=False)
        os.utime(folder / "incident.json", (100 - step, 100 - step))
    summary = summarize(tmp_path)
    assert [path.parent.name for path in summary.incidents] == ["step-2", "step-9", "step-12", "step-12-2"]
    assert summary.incident.step == 12


@pytest.mark.slow_unit
def test_a_bundle_is_read_in_pieces_and_a_text_that_rows_share_is_held_once(tmp_path):
    rows = 300
    table = pyarrow.table(
        {
            "sequence": list(range(rows)),
            "position": [0] * rows,
            "token": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, "int32"), ["t" * 10**6]),
            "log_ratio": [0.5] * rows,
            "compared": [True] * rows,
            "foreign": [[1.0] * 1000] * rows,
        }
    )
    path = tmp_path / "tokens.parquet"
    parquet.write_table(table, path, store_schema=False)
    tracemalloc.start()
    kept = _tokens(path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert len(kept) == rows
    assert "foreign" not in kept[0]
    assert len(kept[0]["token"]) == 20_000
