"""Incident bundles: whole or absent, nothing redacted in them, and reports that hostile text can't break out of."""

import errno
import json
import math
import os
import re
import struct
import subprocess
import sys

import pyarrow
import pytest
import torch
from pyarrow import parquet
from support.incidents import HOSTILE, batch, decode, diagnosis, hostile_rows, make, rendered, window

from trl_parity.config.parity import ParityConfig
from trl_parity.errors import ConfigError
from trl_parity.report import bundle, figures
from trl_parity.report.bundle import write_incident
from trl_parity.report.escape import code, fenced, prose, visible
from trl_parity.report.figures import draw_evidence, draw_timeline, drawn_limit
from trl_parity.report.markdown import report_markdown
from trl_parity.report.summary import summary_of
from trl_parity.report.token_figures import draw_histogram
from trl_parity.results.incident import read_incident, sequence_rows, versions, windows_in_short
from trl_parity.verdict import Status, Verdict

pytestmark = pytest.mark.slow_unit

FILES = {"incident.json", "tokens.parquet", "report.md", "windows.png", "evidence.png", "log_ratio.png"}


@pytest.fixture
def no_pictures(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr(figures, "INCIDENT_PICTURES", {})


def skeleton(report):
    """What of a report is structure rather than text."""
    tokens = rendered(report)
    assert not [t for t in tokens if t.type in ("html_block", "html_inline", "link_open", "s_open", "em_open")]
    return [(t.type, t.tag) for t in tokens if t.type.endswith("_open") or t.type in ("fence", "image")]


# ---- the folder


def test_a_bundle_is_written_and_read_back(tmp_path):
    given = make()
    folder = write_incident(tmp_path, given, sequence_rows(*batch(), decode))
    assert folder == tmp_path / "incidents" / "step-7"
    assert {p.name for p in folder.iterdir()} == FILES
    assert read_incident(folder) == given
    assert read_incident(str(folder / "incident.json")) == given
    assert next(iter(json.loads((folder / "incident.json").read_text()))) == "schema_version"
    for name in FILES:
        if name.endswith(".png"):
            content = (folder / name).read_bytes()
            assert content[:8] == b"\x89PNG\r\n\x1a\n"
            assert struct.unpack(">I", content[16:20]) == (800,)
            assert f"]({name})" in (folder / "report.md").read_text()


def test_a_bundle_without_diagnosis_windows_or_rows_still_has_its_files(tmp_path):
    given = make(diagnosis=None, windows=[], text="", engine={}, verdict=Verdict(
        step=7, status=Status.HALT, streak=3).to_dict())  # fmt: skip
    folder = write_incident(tmp_path, given, [])
    assert {p.name for p in folder.iterdir()} == {"incident.json", "tokens.parquet", "report.md"}
    assert parquet.read_table(folder / "tokens.parquet").num_rows == 0
    report = (folder / "report.md").read_text()
    assert "no diagnosis was made" in report
    assert "![" not in report
    assert read_incident(folder) == given


@pytest.mark.usefixtures("no_pictures")
def test_the_same_step_again_overwrites_nothing(tmp_path):
    names = [write_incident(tmp_path, make(text=text), []).name for text in ("first", "second", "third")]
    assert names == ["step-7", "step-7-2", "step-7-3"]
    assert [read_incident(tmp_path / "incidents" / name).text for name in names] == ["first", "second", "third"]


@pytest.mark.usefixtures("no_pictures")
def test_a_name_taken_at_the_last_moment_is_not_overwritten(tmp_path, monkeypatch):
    rename = os.rename

    def beaten(source, target):
        if target.name == "step-7":
            target.mkdir()
            (target / "theirs").write_text("theirs")
        rename(source, target)

    monkeypatch.setattr(os, "rename", beaten)
    assert write_incident(tmp_path, make(), []).name == "step-7-2"
    assert [p.name for p in (tmp_path / "incidents" / "step-7").iterdir()] == ["theirs"]


@pytest.mark.parametrize("failing", ["_write_tokens", "report_markdown", "_rename"])
@pytest.mark.usefixtures("no_pictures")
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, failing):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bundle, failing, full)
    with pytest.raises(ConfigError, match=r"cannot write .*step-7: No space left on device\. Expected"):
        write_incident(tmp_path, make(), [])
    assert list((tmp_path / "incidents").iterdir()) == []


@pytest.mark.usefixtures("no_pictures")
def test_any_other_failure_leaves_nothing_behind_either(tmp_path):
    with pytest.raises(pyarrow.ArrowInvalid):
        write_incident(tmp_path, make(diagnosis=None), [{**hostile_rows("a")[0], "position": "not a number"}])
    assert list((tmp_path / "incidents").iterdir()) == []


@pytest.mark.usefixtures("no_pictures")
def test_a_folder_that_cannot_be_made_is_named_with_a_remedy(tmp_path):
    (tmp_path / "parity").write_text("a file, not a directory")
    with pytest.raises(ConfigError, match="parity_dir or output_dir"):
        write_incident(tmp_path / "parity", make(), [])


def test_a_picture_that_fails_costs_neither_the_bundle_nor_the_others(tmp_path, monkeypatch, caplog):
    def broken(summary):
        raise RuntimeError("no <font>")

    monkeypatch.setitem(figures.INCIDENT_PICTURES, "windows.png", broken)
    folder = write_incident(tmp_path, make(), sequence_rows(*batch(), decode))
    assert {p.name for p in folder.iterdir()} == FILES - {"windows.png"}
    report = (folder / "report.md").read_text()
    assert "windows.png could not be drawn (RuntimeError: no \\<font>)" in report
    assert "(windows.png)" not in report
    assert "RuntimeError: no <font>" in caplog.text


def test_without_matplotlib_the_report_says_how_to_get_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = write_incident(tmp_path, make(), sequence_rows(*batch(), decode))
    assert {p.name for p in folder.iterdir()} == {"incident.json", "tokens.parquet", "report.md"}
    assert "Run: pip install 'trl-parity[report]'." in (folder / "report.md").read_text()


# ---- incident.json


@pytest.mark.usefixtures("no_pictures")
def test_numbers_that_are_not_finite_become_strings(tmp_path):
    given = make(diagnosis=diagnosis(confidence=math.nan, details={"gap": [math.inf, -math.inf]}),
                 engine={"scale": torch.tensor(math.inf), "dtype": torch.bfloat16, "on": True},
                 windows=windows_in_short([window(7, Status.HALT, 3, k3=math.inf)]))  # fmt: skip
    rows = hostile_rows("a")
    rows[0] |= {"log_ratio": -math.inf, "trainer_logprob": -math.inf}
    rows[1] |= {"log_ratio": math.nan}
    folder = write_incident(tmp_path, given, rows)

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((folder / "incident.json").read_text(), parse_constant=refuse)
    back = read_incident(folder)
    assert back.diagnosis["confidence"] == "nan"
    assert back.diagnosis["details"] == {"gap": ["inf", "-inf"]}
    assert back.engine == {"scale": "inf", "dtype": "torch.bfloat16", "on": True}
    assert back.windows[-1]["trimmed/kl_k3"] == "inf"
    values = parquet.read_table(folder / "tokens.parquet")["log_ratio"].to_pylist()
    assert values[0] == -math.inf
    assert math.isnan(values[1])
    # a file that was read back can be told and drawn again
    assert "confidence in this cause: nan" in report_markdown(back, rows, []).lower()
    assert draw_evidence(summary_of(back, rows)) is not None
    assert draw_histogram(summary_of(back, rows)) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, r"schema_version 2\. Expected 1.*update this one"),
        ({"schema_version": "1"}, r"schema_version '1'\. Expected 1: read it with the trl-parity that wrote it\."),
        ({"schema_version": True}, "schema_version True"),
        ({"step": "7"}, "step as str"),
        ({"step": True}, "step as bool"),
        ({"diagnosis": []}, "diagnosis as list"),
        ({"windows": None}, "windows as NoneType"),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_a_foreign_file_is_refused(tmp_path, change, message):
    folder = write_incident(tmp_path, make(), [])
    path = folder / "incident.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        read_incident(folder)


@pytest.mark.usefixtures("no_pictures")
def test_a_missing_cut_or_incomplete_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*incident\.json or its folder"):
        read_incident(tmp_path / "step-1")
    folder = write_incident(tmp_path, make(), [])
    path = folder / "incident.json"
    whole = path.read_text()
    path.write_text(whole[:-200])
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_incident(folder)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        read_incident(folder)
    path.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != "verdict"}))
    with pytest.raises(ConfigError, match="has no verdict"):
        read_incident(folder)
    path.write_text(json.dumps(json.loads(whole) | {"added_later": 1}))  # harmless
    assert read_incident(folder) == make()


def test_windows_in_short_keep_the_last_ones_and_what_rules_look_at():
    verdicts = [window(step) for step in range(1, 301)]
    verdicts.append(Verdict(step=301, status=Status.ERROR, streak=1))  # no statistics at all
    short = windows_in_short(verdicts)
    assert [short[0]["step"], len(short)] == [102, 200]
    assert short[0] == {"step": 102, "status": "OK", "streak": 0, "trimmed/kl_k3": 1e-4, "floor/kl_k3": 3e-5,
                        "limit/kl_k3": 1.2e-4, "nonfinite_rate": 0.0, "reward/mean": 0.5}  # fmt: skip
    assert short[-1] == {"step": 301, "status": "ERROR", "streak": 1}
    assert len(windows_in_short(verdicts, limit=3)) == 3
    assert windows_in_short(verdicts, limit=0) == []
    own_rule = Verdict(step=302, status=Status.BREACH, streak=1, breaches=("seq/ess",), stats=verdicts[0].stats)
    assert windows_in_short([own_rule])[0]["seq/ess"] == 0.9


# ---- tokens.parquet


def test_the_worst_sequences_come_first_and_whole():
    rollout, scored = batch()
    rows = sequence_rows(rollout, scored, decode, count=2)
    assert [row["sequence"] for row in rows] == [2] * 4 + [1] * 4
    assert [row["position"] for row in rows] == [0, 1, 2, 3] * 2
    assert [row["token_id"] for row in rows] == [108, 109, 110, 111, 104, 105, 106, 107]
    assert [row["prompt"] for row in rows] == ["<7>", None, None, None] * 2  # without its padding
    first = rows[0]
    assert first["token"] == "<108>"
    assert first["log_ratio"] == pytest.approx(0.2, abs=1e-6)
    assert first["rollout_logprob"] == float(rollout.rollout_logprobs[2, 0])
    assert first["trainer_logprob"] == float(scored.trainer_logprobs[2, 0])
    assert (first["entropy"], first["compared"]) == (1.0, True)


def test_tokens_that_were_not_compared_are_kept_without_the_numbers_nobody_knows():
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2, 1], mask[0] = False, False
    trainer = torch.full((3, 4), -9.0)
    rollout, scored = batch(mask=mask, trainer_logprobs=trainer, entropy=None)
    rollout.completion_mask[2, 3] = rollout.engine_mask[2, 3] = mask[2, 3] = 0  # padding
    rollout.engine_mask[2, 1] = 0  # a tool's token
    rows = sequence_rows(rollout, scored, decode)
    assert {row["sequence"] for row in rows} == {1, 2}  # 0 has nothing compared
    of_2 = [row for row in rows if row["sequence"] == 2]
    assert [row["position"] for row in of_2] == [0, 1, 2]
    assert [row["compared"] for row in of_2] == [True, False, True]
    assert [of_2[1][k] for k in ("rollout_logprob", "trainer_logprob", "log_ratio", "entropy")] == [None] * 4
    assert of_2[0]["entropy"] is None


def test_a_sequence_with_a_token_of_no_finite_log_prob_is_among_the_worst():
    trainer = torch.full((3, 4), -1.0)
    trainer[1, 2] = float("nan")
    rollout, scored = batch(trainer_logprobs=trainer)
    rows = sequence_rows(rollout, scored, None, count=1)
    assert {row["sequence"] for row in rows} == {1}
    assert math.isnan(rows[2]["log_ratio"])


def test_nothing_compared_gives_no_rows():
    assert sequence_rows(*batch(), decode, count=0) == []
    assert sequence_rows(*batch(mask=torch.zeros(3, 4, dtype=torch.bool)), decode) == []


@pytest.mark.usefixtures("no_pictures")
def test_the_parquet_file_holds_the_rows_as_they_were(tmp_path):
    rows = sequence_rows(*batch(), decode)
    folder = write_incident(tmp_path, make(), rows)
    table = parquet.read_table(folder / "tokens.parquet")
    kinds = {"sequence": "int64", "position": "int64", "token_id": "int64", "token": "string", "prompt": "string",
             "rollout_logprob": "double", "trainer_logprob": "double", "log_ratio": "double", "entropy": "double",
             "compared": "bool"}  # fmt: skip
    assert {field.name: str(field.type) for field in table.schema} == kinds
    assert table.to_pylist() == [{name: row[name] for name in kinds} for row in rows]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.usefixtures("no_pictures")
def test_the_parquet_file_holds_hostile_text_as_it_was(tmp_path, text):
    folder = write_incident(tmp_path, make(diagnosis=None, windows=[]), hostile_rows(text))
    kept = parquet.read_table(folder / "tokens.parquet")["token"].to_pylist()[0]
    assert kept == text.encode("utf-8", "backslashreplace").decode()


# ---- redaction


def test_a_redacted_bundle_holds_no_ids_text_or_prompts(tmp_path):
    secrets = {"token": "XSECRETX", "token_ids": [987654], "tokens": ["XSECRETX"], "text": "XSECRETX", "ids": [987654],
               "prompt": "XSECRETX", "banned": [987654], "bias": [[987654, 1.0]], "allowed": [987654],
               "logit_bias": {"987654": 1.0}, "bad_words": ["XSECRETX"], "kept": 1}  # fmt: skip
    found = diagnosis(details={**secrets, "tokens": 512, "by_position": [secrets]})
    found["evidence"][0]["details"] = {"deep": [{"deeper": secrets}], **secrets}
    given = make(redacted=True, diagnosis=found, engine={"mode": "colocate", "requests": [secrets]})
    # rows that were decoded by mistake, too
    rows = [{**row, "token": "XSECRETX", "token_id": 987654, "prompt": "XSECRETX"} for row in hostile_rows("")]
    folder = write_incident(tmp_path, given, rows)
    table = parquet.read_table(folder / "tokens.parquet")
    assert table.column_names == ["sequence", "position", "rollout_logprob", "trainer_logprob", "log_ratio",
                                  "entropy", "compared"]  # fmt: skip
    for path in folder.iterdir():
        content = path.read_bytes()
        assert b"XSECRETX" not in content
        assert b"987654" not in content
        assert struct.pack("<q", 987654) not in content
    back = read_incident(folder)
    assert back.redacted
    assert back.diagnosis["evidence"][0]["details"] == {"deep": [{"deeper": {"kept": 1}}], "kept": 1}
    assert back.diagnosis["details"] == {"kept": 1, "tokens": 512, "by_position": [{"kept": 1}]}  # a count
    report = report_markdown(given, rows, [])
    assert "XSECRETX" not in report
    assert "987654" not in report
    assert "redacted" in report
    assert "-0.500" in report  # the numbers stay


@pytest.mark.usefixtures("no_pictures")
def test_no_bundle_holds_keys_or_passwords(tmp_path):
    secret = "Zq81xVbn27Lk"
    failed = f"ConnectionError: no answer from http://me:{secret}@host:8000/v1"
    found = diagnosis(details={"tokens": 512, "token": " kept"})
    found["evidence"][3]["error"] = failed
    given = make(
        diagnosis=found, engine={"mode": "server", "url": f"http://me:{secret}@host:8000"}, text=f"halted: {failed}",
        config={**ParityConfig().to_dict(), "engine_args": {"hf_token": secret, "dtype": "bfloat16"}},
    )  # fmt: skip
    folder = write_incident(tmp_path, given, hostile_rows("a"))
    assert not any(secret.encode() in path.read_bytes() for path in folder.iterdir())
    back = read_incident(folder)
    assert back.engine["url"] == "http://***@host:8000"
    assert back.config["engine_args"] == {"hf_token": "***", "dtype": "bfloat16"}
    assert back.diagnosis["details"]["token"] == " kept"
    assert secret not in report_markdown(given, [], [])  # of an incident that was written before


@pytest.mark.usefixtures("no_pictures")
def test_a_bundle_with_text_is_for_its_user_alone_and_goes_through_no_link(tmp_path):
    for redacted, mode in ((False, 0o700), (True, 0o755)):
        before = os.umask(0o022)
        try:
            folder = write_incident(tmp_path, make(redacted=redacted), [])
        finally:
            os.umask(before)
        assert folder.stat().st_mode & 0o777 == mode
    (theirs := tmp_path / "theirs").mkdir()
    (run := tmp_path / "run").mkdir()
    (run / "incidents").symlink_to(theirs)
    with pytest.raises(ConfigError, match="incidents is a symbolic link"):
        write_incident(run, make(), [])
    assert list(theirs.iterdir()) == []


def test_rows_made_without_a_decoder_hold_no_ids():
    assert not {"token_id", "token", "prompt"} & set(sequence_rows(*batch(), None)[0])


@pytest.mark.usefixtures("no_pictures")
def test_a_bundle_that_is_not_redacted_keeps_its_details(tmp_path):
    folder = write_incident(tmp_path, make(), [])
    assert read_incident(folder).diagnosis["evidence"][1]["details"]["deep"] == [{"ids": [4242], "n": 1}]


# ---- report.md


def test_the_report_tells_cause_evidence_fix_and_what_was_not_probed():
    report = report_markdown(make(), sequence_rows(*batch(), decode), ["windows.png", "evidence.png"])
    headings = re.findall(r"^## (.*)", report, re.MULTILINE)
    assert headings == ["What happened", "Why", "Going on anyway", "Worst sequences", "Settings and versions"]
    assert "**Cause** `stale_weights`: The engine holds older weights." in report
    assert "Explained: 97% of the excess over the noise floor. Confidence in this cause: 99.5%." in report
    assert "```\nrepair the weight sync.\n```" in report
    probes = re.findall(r"^\| `(\w+)` \| the engine \\\| holds older weights \| (.*) \|$", report, re.MULTILINE)
    assert probes == [
        ("older", "0.01 → 0.0003 | 97% | forward, 0.0 s"),
        ("tried", "0.01 → 0.0089 | 11% | forward, 0.0 s"),
        ("looked", "0.01 → - | - | forward, 0.0 s"),
    ]
    assert "- `server` (the engine \\| holds older weights): the engine is behind a server" in report
    assert 'ParityConfig(action="log")' in report
    assert re.search(r"--set rules\.kl_k3\.limit=[\de.-]+\b", report)
    assert '"consecutive": 2' in report
    assert "log_ratio.png" not in report  # was not given


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_completions_stay_in_their_block(text):
    report = report_markdown(make(), hostile_rows(text), [])
    assert skeleton(report) == skeleton(report_markdown(make(), hostile_rows("a"), []))
    assert all(c == "\n" or (c.isprintable() and c not in "\u3164") for c in report)
    report.encode()
    assert '"\u0301' not in report  # sits on nothing of ours


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_words_of_libraries_change_nothing_but_words(text):
    def told(words):
        found = diagnosis(summary="S " + words, fix="F " + words)
        for e in found["evidence"]:
            e |= {"hypothesis": words, "finding": words, "cost": words}
        found["evidence"][-1]["error"] = found["evidence"][-1]["name"] = words
        found["cause"] = words
        verdict = make().verdict | {"reason": words, "breaches": [words]}
        incident = make(diagnosis=found, verdict=verdict, text="T\n" + words.replace("\n", " "),
                        engine={"name | x": words, words: 1}, config={"parity_dir": words})  # fmt: skip
        return report_markdown(incident, [], [], note=words)

    report = told(text)
    assert all(c == "\n" or c.isprintable() for c in report)
    assert skeleton(report) == skeleton(told("plain"))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_is_escaped_reads_as_it_was(text):
    """Rendered, an escaped text is the visible text: nothing is lost, nothing is added."""
    paragraph = [t for t in rendered("x " + prose(text)) if t.type == "inline"]
    said = "".join(t.content if t.type == "text" or t.type == "text_special" else "?" for t in paragraph[0].children)
    assert said == "x " + visible(" ".join(text.split()))
    [span] = [t for t in rendered("x " + code(text.replace("|", ""))) if t.type == "code_inline"]
    assert span.content.strip() == visible(text.replace("|", "")).strip()
    [block] = [t for t in rendered(fenced(text)) if t.type == "fence"]
    assert block.content == "\n".join(visible(line) for line in text.split("\n")) + "\n"


def test_long_texts_are_cut_and_said_to_be():
    rows = hostile_rows("x" * 5000)
    report = report_markdown(make(), rows, [])
    assert len(report) < 10_000
    assert f'prompt      …"{"x" * 160}"' in report
    assert f'completion  "{"x" * 160}"…' in report


def test_the_report_is_bounded_and_names_what_it_leaves_out():
    rows = sequence_rows(*batch(rows=16, columns=200), decode)
    report = report_markdown(make(), rows, [])
    assert "The worst 4 of 16" in report
    assert len(report.splitlines()) < 250


# ---- pictures


@pytest.mark.parametrize(
    "windows",
    [
        [window(1, Status.HALT, 1, k3=0.2)],
        [window(1, k3=0.0), window(2, Status.HALT, 1, k3=math.inf)],
        [
            window(1),
            Verdict(step=2, status=Status.NO_DATA, streak=0),
            window(3, Status.HALT, 1, **{"floor/kl_k3": None}),
        ],
        [window(5, status, 0) for status in Status],
    ],
    ids=["one", "zero-and-infinite", "gaps", "every-status"],
)
def test_timelines_of_odd_runs_are_drawn(windows, recwarn):
    assert draw_timeline(summary_of(make(windows=windows_in_short(windows)), [])) is not None
    assert not list(recwarn)


def test_a_timeline_of_a_run_with_its_own_rules_or_another_versions_settings_is_drawn():
    for config in (ParityConfig(rules={"kl_k3": None}).to_dict(), ParityConfig(rules={"kl_k3": 0.5}).to_dict(),
                   {"unknown": 1}):  # fmt: skip
        assert draw_timeline(summary_of(make(config=config), [])) is not None
    assert draw_timeline(summary_of(make(windows=windows_in_short([window(1, k3=None)])), [])) is None


def test_the_limit_drawn_is_the_one_the_breaker_used():
    from trl_parity.judging.breaker import read

    for config in (
        ParityConfig(),
        ParityConfig(rules={"kl_k3": 0.5}),
        ParityConfig(rules={"kl_k3": {"ceiling": None}}),
    ):
        rule = next(r for r in config.resolved_rules() if r.stat == "kl_k3")
        for floor in (None, 0.0, 1e-5, 1e-2, 0.09):
            limit = drawn_limit(rule, math.nan, math.nan if floor is None else floor)
            for k3, over in ((limit * 0.999, False), (limit * 1.001, True)):
                assert read(rule, {"kl_k3": k3, "floor/kl_k3": floor}).over is over


@pytest.mark.parametrize("delta", [0.0, 1e-9, -40.0, math.inf])
def test_histograms_of_odd_log_ratios_are_drawn(delta, recwarn):
    rows = [{**row, "log_ratio": d, "trainer_logprob": row["rollout_logprob"] + d}
            for row, d in zip(hostile_rows("a"), (delta, 0.1, -0.1), strict=True)]  # fmt: skip
    assert draw_histogram(summary_of(make(), rows)) is not None
    lone = draw_histogram(summary_of(make(), [{**rows[0]}]))
    assert (lone is None) is math.isinf(delta)
    assert not list(recwarn)


def test_labels_from_outside_are_no_formulas(recwarn):
    found = diagnosis()
    for e in found["evidence"]:
        e |= {"name": "$\\frac{$ \x1b[31m" * 9, "error": "$x$ \n$" * 40}
    assert draw_evidence(summary_of(make(diagnosis=found | {"cause": "$\\x$"}), [])) is not None
    assert draw_timeline(summary_of(make(verdict=make().verdict | {"breaches": ["$\\x$"] * 9}), [])) is not None
    assert not list(recwarn)


# ---- imports


def test_versions_name_what_is_installed():
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "trl_parity", "transformers", "trl", "accelerate"} <= set(found)
    assert all(isinstance(v, str) for v in found.values())


@pytest.mark.usefixtures("no_pictures")
def test_reading_and_telling_need_no_torch(tmp_path):
    folder = write_incident(tmp_path, make(), sequence_rows(*batch(), decode))
    script = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'transformers', 'matplotlib'): sys.modules[name] = None\n"
        "from trl_parity.results.incident import read_incident, versions\n"
        "from trl_parity.report.markdown import report_markdown\n"
        "incident = read_incident(sys.argv[1])\n"
        "assert 'stale_weights' in report_markdown(incident, [], [])\n"
        "assert versions()['torch']\n"
        "assert 'pyarrow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, timeout=60)
