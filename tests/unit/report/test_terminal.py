"""`trl-parity watch`: following a file through its whole life, and what it draws."""

import json
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console
from support.windows import window

from trl_parity import ParityConfig, ParityMonitor
from trl_parity.cli import main
from trl_parity.report.follow import Tail, follow, line_of
from trl_parity.report.terminal import dashboard, sparkline


def lines(*steps):
    return "".join(json.dumps({"step": step, "status": "OK", "kl_k3": 1e-5}) + "\n" for step in steps)


def steps(rows):
    return [row["step"] for row in rows]


def test_a_tail_waits_for_its_file_and_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert steps(tail.poll()) == []
    path.write_text(lines(1, 2))
    assert steps(tail.poll()) == [1, 2]
    with open(path, "a") as f:
        f.write(lines(3)[:10])
        f.flush()
        assert steps(tail.poll()) == []
        f.write(lines(3)[10:])
    assert steps(tail.poll()) == [3]
    assert tail.restarts == 0


@pytest.mark.parametrize("how", ["replaced", "cut", "copied away"])  # the last: cut, and longer by now
def test_a_restarted_run_is_read_from_its_beginning(tmp_path, how):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2, 3))
    tail = Tail(path)
    assert steps(tail.poll()) == [1, 2, 3]
    if how == "replaced":  # as a new run does: the old file is kept under another name
        os.replace(path, tmp_path / "metrics-1.jsonl")
        assert steps(tail.poll()) == []
    path.write_text(lines(*((5, 6, 7, 8, 9) if how == "copied away" else (1,))))
    assert steps(tail.poll()) == ([5, 6, 7, 8, 9] if how == "copied away" else [1])
    assert tail.restarts == 1


def test_a_line_without_an_end_costs_no_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as f:
        f.write("x" * 10_000_000)
        f.flush()
        tail = Tail(path)
        assert steps(tail.poll()) == []
        assert len(tail._partial) < 5_000_000
        f.write("x\n" + lines(1))
    assert steps(tail.poll()) == [1]


def test_the_picture_goes_on_over_a_rotation_and_a_restart(tmp_path):
    """One look after the other, as `watch` takes them, on a console that is no terminal."""
    import io

    path = tmp_path / "parity" / "metrics.jsonl"
    out = io.StringIO()
    look = follow(str(tmp_path), Console(file=out), every=0)
    next(look)  # no folder yet
    path.parent.mkdir()
    path.write_text(lines(1, 2))
    next(look)
    os.replace(path, path.with_name("metrics-1.jsonl"))
    next(look)  # gone for a moment
    path.write_text(lines(7))
    next(look)
    with open(path, "a") as f:
        f.write(lines(8))
    (path.parent / "config.json").write_text("{")  # half written: the windows are shown all the same
    next(look)
    look.close()
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1", "2", "7", "8"]


def test_torn_and_foreign_lines_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "sta\n[1]\n"x"\n' + lines(2))
    assert steps(Tail(path).poll()) == [2]


def recorded(tmp_path, values):
    monitor = ParityMonitor(output_dir=tmp_path, floor={"kl_k3": 1e-5})
    for step, value in enumerate(values, start=1):
        monitor.judge(step, monitor.scalars(window(kl_k3=value, trimmed__kl_k3=value, entropy__trainer=0.5)))
    monitor.close()
    return tmp_path / "parity" / "metrics.jsonl"


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_picture_shows_status_limits_and_what_went_wrong(tmp_path, width):
    path = recorded(tmp_path, [1e-5] * 60 + [6.1e-5, 2.1e-4, 2.1e-4])
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(dashboard(path, list(Tail(path).poll()), ParityConfig(), 2.0, width))
    text = console.export_text()
    assert "BREACH" in text.splitlines()[0]
    assert "streak 2 of 3" in text.splitlines()[0]
    row = next(line for line in text.splitlines() if line.startswith("kl_k3"))
    assert "0.00021" in row
    assert "200%" in row  # an excess of 2e-4 over a limit of 1e-4
    assert row.rstrip().endswith("█")
    assert "WARN    step 61" in text
    assert "excess/kl_k3 0.0002 > 0.0001" in text
    assert "…" not in row  # nothing is cut at any width
    assert max(map(len, text.splitlines())) <= width


def test_sparklines_scale_and_leave_gaps():
    assert sparkline([0, 1, 2, None, 7]) == "▁▂▃ █"
    assert sparkline([1e-6, 1e-5, 1e-4, 1e-3]) == "▁▃▆█"  # a decade and more: log scale
    assert sparkline([1, float("inf")]) == "▁█"
    assert sparkline([None, None]) == ""
    assert sparkline([3, 3]) == "▁▁"


def test_a_window_is_one_line_for_logs():
    row = {"step": 3, "status": "BREACH", "streak": 1, "kl_k3": 0.2, "floor/kl_k3": None, "reason": "kl_k3 0.2 > 0.1"}
    assert line_of(row) == "step 3  BREACH 1  kl_k3 0.2  kl_k3 0.2 > 0.1"


def test_once_prints_and_ends(tmp_path, capsys):
    recorded(tmp_path, [1e-5] * 3)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "3 windows" in capsys.readouterr().out
    (tmp_path / "folder" / "parity" / "metrics.jsonl").mkdir(parents=True)
    for none in ("nothing", "folder"):
        assert main(["watch", str(tmp_path / none), "--once"]) == 2  # a script sees it
        [line] = capsys.readouterr().err.splitlines()
        assert none in line
        assert "no window of a run was judged yet" in line


@pytest.mark.slow_unit
def test_without_a_terminal_each_new_window_is_a_line_without_colours(tmp_path):
    command = [sys.executable, "-m", "trl_parity", "watch", str(tmp_path), "--every", "0.05"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        time.sleep(1.0)
        recorded(tmp_path, [1e-5, 2.1e-4])  # the folder comes later
        got = [watching.stdout.readline() for _ in range(2)]
    finally:
        watching.terminate()
        watching.wait()
    assert [line.split("  ")[:2] for line in got] == [["step 1", "OK"], ["step 2", "BREACH 1"]]
    assert "\x1b" not in "".join(got)
