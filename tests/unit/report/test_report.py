"""`trl-parity report`: on runs and incidents, on hostile input, and without torch, vllm and wandb."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from support import ROOT
from support.incidents import HOSTILE, diagnosis, hostile_rows, make, rendered
from support.incidents import window as incident_window
from support.runs import run, safe
from support.windows import window

from trl_parity import ParityConfig, ParityMonitor
from trl_parity.cli import main
from trl_parity.errors import ConfigError, DataError
from trl_parity.report.bundle import write_incident
from trl_parity.report.html import render_page, tokens_html
from trl_parity.report.summary import headline, summarize
from trl_parity.results.incident import windows_in_short
from trl_parity.results.reader import Columns, iter_windows, samples
from trl_parity.verdict import Status

pytestmark = pytest.mark.slow_unit

HALTED = [1e-5] * 6 + [3e-4, 5e-4, 9e-4]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return run(tmp_path_factory.mktemp("healthy"), [1e-5, 2e-5] * 5)


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("halted"), HALTED)


# ---- what it says


def test_a_healthy_run_is_said_to_be_healthy(healthy, tmp_path, capsys):
    assert headline(summarize(healthy)) == ("OK", "healthy in all 10 windows, to step 10.")
    assert main(["report", str(healthy)]) == 0
    out = capsys.readouterr().out
    assert "healthy in all 10 windows" in out
    assert "torch 2.13" in out
    assert "\x1b" not in out  # no terminal, no colours
    assert main(["report", str(healthy), "--html", str(tmp_path / "r.html")]) == 0
    shown = safe((tmp_path / "r.html").read_text())
    assert "OK" in shown
    assert "bfloat16" in shown
    assert (tmp_path / "r.html").read_text().count("<img") == 5  # no incident: no evidence


def test_a_halted_run_tells_since_when_and_why_in_every_form(halted, tmp_path, capsys):
    status, sentence = headline(summarize(halted))
    assert status == "HALT"
    assert sentence == "halted at step 9; over the limit since step 7; cause: stale_weights."
    page, notes = tmp_path / "report.html", tmp_path / "my report.md"
    assert main(["report", str(halted), "--html", str(page), "--markdown", str(notes)]) == 0
    shown = safe(page.read_text())
    for said in ("halted at step 9", "since step 7", "stale_weights", "repair the weight sync", "before step 7",
                 "Worst sequences", "processed_logprobs", "consecutive"):  # fmt: skip
        assert said in shown, said
    assert page.read_text().count("<img") == 6
    pictures = {p.name for p in (tmp_path / "my report-pictures").iterdir()}
    assert pictures == {"timeline.png", "histogram.png", "scatter.png", "position.png", "entropy.png", "evidence.png"}
    for name in pictures:
        assert f"](my%20report-pictures/{name})" in notes.read_text()
    assert main(["report", str(halted)]) == 0
    out = capsys.readouterr().out
    assert "halted at step 9; over the limit since step 7" in out
    assert "█" in out  # evidence
    assert main(["report", str(halted), "--markdown", "-"]) == 0
    assert "![" not in capsys.readouterr().out


def test_an_incident_is_told_alone_and_with_its_run(halted, tmp_path):
    folder = halted / "parity" / "incidents" / "step-9"
    with_run = summarize(folder)
    assert with_run.columns.count == 9
    assert len(with_run.before)
    alone = summarize(shutil.copytree(folder, tmp_path / "sent-by-mail"))
    assert alone.columns.count == 9  # the windows it brought along
    assert alone.of == "tokens of the worst sequences"
    assert headline(alone)[1].startswith("halted at step 9; over the limit since step 7")
    assert main(["report", str(tmp_path / "sent-by-mail" / "incident.json"), "--html", str(tmp_path / "a.html")]) == 0
    safe((tmp_path / "a.html").read_text())


@pytest.mark.parametrize(
    ("statuses", "onset", "halt"),
    [
        ("OK OK BREACH OK OK BREACH BREACH HALT", 6, 8),  # a lone breach is over at the next OK
        ("OK BREACH WARN BREACH HALT", 2, 5),  # WARN holds a streak
        ("OK BREACH OK", 2, None),
        ("OK WARN OK", None, None),
        ("BREACH BREACH HALT HALT OK BREACH", 1, 3),
    ],
)
def test_the_onset_is_where_the_streak_that_halted_began(statuses, onset, halt):
    rows, streak = [], 0
    for step, status in enumerate(statuses.split(), start=1):
        streak = 0 if status == "OK" else streak + (status in ("BREACH", "HALT"))
        rows.append({"step": step, "status": status, "streak": streak, "reason": ""})
    columns = Columns.of(rows, ("kl_k3",))
    assert (columns.onset, columns.first_halt) == (onset, halt)


def test_samples_are_split_at_the_onset(halted):
    before, after = samples(halted, 7)
    assert (before.windows, after.windows) == (6, 3)
    assert len(before) == 6 * 60
    assert sum(before.trainer_logprob) - sum(before.rollout_logprob) > sum(after.trainer_logprob) - sum(
        after.rollout_logprob
    )


def test_columns_beyond_their_limit_are_merged_and_nothing_is_lost():
    rows = [{"step": i, "status": "HALT" if i == 777 else "OK", "streak": 0, "reason": "", "kl_k3": float(i)}
            for i in range(1, 1001)]  # fmt: skip
    columns = Columns.of(rows, ("kl_k3",), limit=64)
    assert len(columns.steps) <= 64
    assert columns.count == 1000
    assert columns.status.count("HALT") == 1  # the worst of a row is kept
    assert columns.first_halt == 777
    full = columns.count // columns.width * columns.width
    kept = list(columns.values["kl_k3"])[: full // columns.width]
    assert sum(kept) * columns.width == pytest.approx(sum(range(1, full + 1)))


# ---- hostile input


def test_whatever_a_model_wrote_is_only_text(tmp_path, capsys):
    """Every hostile text as status, reason, breach, token and prompt, in every form and command."""
    folder = run(tmp_path / "run", HALTED)
    path = folder / "parity" / "metrics.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    rows = []
    with open(path, "a") as f:  # a file somebody else wrote
        for i, text in enumerate(HOSTILE.values()):
            f.write(json.dumps(last | {"step": 10 + 2 * i, "reason": text, "breaches": [text]}) + "\n")
            f.write(json.dumps(last | {"step": 11 + 2 * i, "status": text, "reason": text}) + "\n")
            rows += [row | {"sequence": i} for row in hostile_rows(text)]
    everything = "".join(HOSTILE.values())
    given = make(step=40, text=everything, engine={everything: everything}, versions={everything: everything},
                 diagnosis=diagnosis(cause=everything, summary=everything, fix=everything))  # fmt: skip
    write_incident(folder / "parity", given, rows)
    assert main(["report", str(folder), "--html", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "r.md")]) == 0
    assert "Sequence 6" in safe((tmp_path / "r.html").read_text())
    tokens = rendered((tmp_path / "r.md").read_text())
    assert not [t for t in tokens if t.type in ("html_block", "html_inline", "link_open")]
    capsys.readouterr()
    for command in (["report"], ["watch", "--once"], ["replay", "--all"], ["compare", str(folder)]):
        main([*command, str(folder)])
        out = capsys.readouterr().out
        assert "alert(1)" in out or command[0] != "report"
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", out), command


def test_tokens_are_escaped_coloured_by_their_sign_and_readable():
    rows = hostile_rows('<script>alert("x")</script>')
    rows[1] |= {"log_ratio": 0.5}
    rows[2] |= {"log_ratio": float("inf")}
    page = tokens_html(rows, redacted=False)
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    assert 'class="t less" style="background:rgba(213,94,0,0.45)"' in page
    assert 'class="t more" style="background:rgba(0,114,178,0.45)"' in page
    assert 'class="t odd"' in page
    redacted = tokens_html([{k: v for k, v in row.items() if k not in ("token", "prompt")} for row in rows], True)
    assert "alert" not in redacted
    assert "·" in redacted


def test_a_page_loads_nothing_from_anywhere():
    page = render_page("<t>", ["![x](http://evil/a.png) ![y](a.png) [l](http://evil) <b>raw</b>"], {"a.png": b"png"})
    safe(page)
    assert 'src="data:image/png;base64,cG5n"' in page
    assert "<b>" not in page


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": "x", "status": "OK"}', b'{"step": 1e999, "status": "OK"}', b'{"step": true, "status": "OK"}', b"[]",
        b'{"step": 1, "status": 7}', b"[" * 100_000, b"\xff\xfe", b'{"step": 1', b"", b"null", b'{"step": {}}',
        b'{"step": 1, "status": "OK", "n": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_lines_that_are_no_windows_are_passed_over(healthy, tmp_path, line):
    lines = (healthy / "parity" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(lines[0] + line + b"\n" + b"".join(lines[1:]))
    assert [row["step"] for row in iter_windows(tmp_path)] == list(range(1, 11))


def test_values_that_are_no_numbers_count_as_not_measured(tmp_path, capsys):
    row = {"schema_version": 2, "step": 1, "status": "OK", "streak": "x", "breaches": 7, "kl_k3": {"a": 1}}
    row |= {"ess": "<b>", "floor/kl_k3": [], "reason": None, "num_tokens": "many", "logp_abs_diff/max": "inf"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    [read] = iter_windows(tmp_path)
    assert (read["kl_k3"], read["ess"], read["logp_abs_diff/max"]) == (None, None, float("inf"))
    for command in ("report", "replay", "watch"):
        assert main([command, str(tmp_path), *(["--once"] if command == "watch" else [])]) == 0
    capsys.readouterr()


def test_what_is_no_run_is_refused_with_what_was_expected(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "metrics.jsonl").write_text("")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "metrics.jsonl").write_text('{"schema_version": 99, "step": 1, "status": "OK"}\n')
    for path, said in (("nothing", "does not exist"), ("empty", "holds neither"), ("blank", "holds no window"),
                       ("newer", "or update this one")):  # fmt: skip
        for command in (["report", str(tmp_path / path)], ["compare", str(tmp_path / path), str(tmp_path / path)]):
            assert main(command) == 2
            err = capsys.readouterr().err
            assert "Traceback" not in err
            if command[0] == "report":
                assert said in err


def test_newer_schemas_are_refused_and_older_ones_read(halted, tmp_path):
    folder = shutil.copytree(halted, tmp_path / "run")
    windows = folder / "parity" / "metrics.jsonl"
    windows.write_text(windows.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    assert summarize(folder).columns.count == 9
    (folder / "parity" / "tokens.jsonl").unlink()  # of a version before there was one
    (folder / "parity" / "run.json").unlink()
    assert summarize(folder).of == "tokens of the worst sequences"
    incident = folder / "parity" / "incidents" / "step-9" / "incident.json"
    incident.write_text(incident.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(ConfigError, match=r"schema_version 9.*update this one"):
        summarize(folder)
    windows.write_text(windows.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(DataError, match=r"schema_version 9.*update this one"):
        summarize(folder)


def test_a_damaged_bundle_costs_a_part_and_is_said(halted, tmp_path, capsys):
    folder = shutil.copytree(halted, tmp_path / "run")
    tokens = folder / "parity" / "incidents" / "step-9" / "tokens.parquet"
    tokens.write_bytes(tokens.read_bytes()[:100])
    (folder / "parity" / "config.json").write_text("{")
    assert main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "tokens.parquet can't be read" in " ".join(out.split())
    assert "is not valid JSON" in " ".join(out.split())


# ---- memory, and machines without the training stack

BOUNDED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
from trl_parity.cli import main
code = main(sys.argv[2:])
# not ru_maxrss, which a child takes over from its parent
print("peak", next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    """60 MB of windows, one line of 8 MB without a window, and a torn end."""
    folder = tmp_path_factory.mktemp("long")
    monitor = ParityMonitor(output_dir=folder, floor={"kl_k3": 1e-5})
    monitor.judge(1, monitor.scalars(window(kl_k3=1e-5, trimmed__kl_k3=1e-5)))
    monitor.close()
    path = folder / "parity" / "metrics.jsonl"
    row = json.loads(path.read_text())
    with open(path, "w") as f:
        size, step = 0, 0
        while size < 60e6:
            step += 1
            size += f.write(json.dumps(row | {"step": step, "kl_k3": step * 1e-9}) + "\n")
            if step == 100:
                f.write("x" * 8_000_000 + "\n")
        f.write('{"step": ')
    return folder, step


@pytest.mark.parametrize("command", ["report", "watch", "replay", "compare"])
def test_memory_does_not_grow_with_the_file(long_file, command):
    """All of it as Python objects would take over 500 MB."""
    folder, count = long_file
    more = {"watch": ["--once"], "compare": [str(folder)], "replay": [], "report": []}[command]
    limit = 1_500_000_000  # of address space: libraries map a lot that they never touch
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(limit), command, str(folder), *more], capture_output=True, text=True,
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1])
    assert peak < 250, peak
    if command in ("report", "compare"):
        assert f"{count:,}" in done.stdout


BLOCKED = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError("No module named " + repr(name) + " (blocked)", name=name)
sys.meta_path.insert(0, Block())
from trl_parity.cli import main
sys.exit(main(sys.argv[1:]))
"""
STACK = {"torch", "vllm", "wandb", "transformers", "trl", "accelerate", "trackio", "datasets"}


def without(blocked, *command):
    code = BLOCKED.replace("{blocked}", repr(set(blocked)))
    return subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, cwd=ROOT)


def test_it_works_without_torch_vllm_and_wandb(halted, healthy, tmp_path):
    done = without(STACK, "report", halted, "--html", tmp_path / "r.html", "--markdown", tmp_path / "r.md")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").read_text().count("<img") == 6
    assert without(STACK, "report", halted).returncode == 0
    done = without(STACK, "compare", healthy, halted, "--html", tmp_path / "c.html")
    assert done.returncode == 1, done.stderr  # they differ


def test_without_matplotlib_the_words_are_there_and_the_lack_is_said(halted, tmp_path):
    done = without(STACK | {"matplotlib"}, "report", halted, "--html", tmp_path / "r.html")
    assert done.returncode == 0
    assert "pip install 'trl-parity[report]'" in done.stderr
    page = (tmp_path / "r.html").read_text()
    assert "<img" not in page
    assert "pip install" in page
    assert "halted at step 9" in page
    assert without({"matplotlib"}, "report", halted).returncode == 0


def test_help_has_examples_and_exit_codes(capsys):
    for command in ("report", "compare", "watch", "replay", "panels"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = capsys.readouterr().out
        assert "examples:" in out
        assert "exit codes:" in out


def test_no_color_is_respected_on_a_terminal(halted):
    """Through a pseudo-terminal, as a person would see it."""
    import pty

    shown = {}
    for env in ({}, {"NO_COLOR": "1"}):
        main_end, other = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "trl_parity", "report", str(halted)], stdout=other, stderr=other, cwd=ROOT,
            env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "TERM": "xterm-256color", **env},
        )  # fmt: skip
        os.close(other)
        out = b""
        while True:
            try:
                block = os.read(main_end, 65536)
            except OSError:
                break
            if not block:
                break
            out += block
        process.wait()
        os.close(main_end)
        shown[bool(env)] = out
    colours = re.compile(rb"\x1b\[[0-9;]*(3[0-9]|4[0-9]|38;5|48;5)[0-9;]*m")
    assert colours.search(shown[False])
    assert not colours.search(shown[True])
    assert b"halted at step 9" in shown[True]


def test_a_run_without_samples_or_settings_is_still_told(tmp_path, capsys):
    folder = run(tmp_path / "r", [1e-5] * 4, tokens=False)
    for name in ("config.json", "run.json", "tokens.jsonl"):
        (folder / "parity" / name).unlink(missing_ok=True)
    assert main(["report", str(folder), "--html", str(tmp_path / "r.html")]) == 0
    assert "is not recorded" in (tmp_path / "r.html").read_text()
    assert (tmp_path / "r.html").read_text().count("<img") == 1
    capsys.readouterr()


def test_a_redacted_incident_shows_a_dot_a_token(tmp_path, capsys):
    incident = make(redacted=True, windows=windows_in_short([incident_window(7, Status.HALT, 3, k3=0.01)]),
                    diagnosis=diagnosis(), config=ParityConfig(redact_text=True).to_dict())  # fmt: skip
    folder = write_incident(tmp_path, incident, hostile_rows("secret"))
    assert main(["report", str(folder)]) == 0
    assert main(["report", str(folder), "--html", str(tmp_path / "r.html")]) == 0
    out = capsys.readouterr().out + (tmp_path / "r.html").read_text()
    assert "secret" not in out
    assert "4242" not in out
    assert "···" in out
