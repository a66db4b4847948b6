"""Whatever lies in place of a run's files, every command says so in one line, and soon."""

import json
import os
import time
import tracemalloc

import pytest
from support.incidents import make
from support.windows import window

from trl_parity import ParityConfig
from trl_parity.cli import main
from trl_parity.config.reading import from_yaml
from trl_parity.errors import ConfigError
from trl_parity.files import NUMBER, open_regular, parse_json, read_bytes, require_kinds, write_atomic
from trl_parity.live.judge import RunJudge
from trl_parity.results.reader import recorded_config, window_of


@pytest.fixture
def run(tmp_path):
    """A run's folder, two windows and an incident."""
    judge = RunJudge(ParityConfig(), measured_floor=False)
    judge.open(tmp_path / "run", [])
    for step in (1, 2):
        judge.judge(step, judge.scalars(window(kl_k3=1e-5, entropy__trainer=1.0)))
    judge.write_run({"versions": {"python": "3.11"}})
    judge.close()
    folder = tmp_path / "run" / "parity" / "incidents" / "step-2"
    incident = make(windows=[], step=2)
    write_atomic(folder / "incident.json", json.dumps({n: getattr(incident, n) for n in type(incident).__slots__}))
    return tmp_path / "run"


COMMANDS = {
    "report": lambda run: ["report", str(run)],
    "watch": lambda run: ["watch", str(run), "--once"],
    "compare": lambda run: ["compare", str(run), str(run)],
    "replay": lambda run: ["replay", str(run)],
    "pilot": lambda run: ["pilot", "--output", str(run)],
}
FILES = ["metrics.jsonl", "config.json", "run.json", "rewards.json", "tokens.jsonl", "incidents/step-2/incident.json"]


def put_pipe(path):
    os.mkfifo(path)


def put_device_link(path):
    path.symlink_to("/dev/zero")


def put_link_out(path):
    outside = path.parents[2] / "outside.json"
    outside.write_text('{"step": 1, "status": "OK", "secret": "of somebody else"}\n')
    path.symlink_to(outside)


def put_folder(path):
    path.mkdir()


def put(text):
    return lambda path: path.write_text(text)


PLACED = {
    "a pipe": put_pipe, "a device": put_device_link, "a link out": put_link_out, "a folder": put_folder,
    "nested": put("[" * 100_000), "nested mapping": put('{"a":' * 5000 + "1" + "}" * 5000 + "\n"),
    "a list": put("[1]\n"), "digits": put('{"schema_version": 1, "step": ' + "9" * 400 + ', "status": "OK"}\n'),
    "many digits": put('{"step": ' + "9" * 5000 + "}\n"), "no text": put('{"status": "\\u202e\\u001b[31m"}\n'),
}  # fmt: skip


@pytest.mark.slow_unit
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("placed", PLACED)
def test_no_command_hangs_falls_or_shows_what_it_must_not(run, capsys, file, placed):
    path = run / "parity" / file
    path.unlink(missing_ok=True)
    PLACED[placed](path)
    began = time.monotonic()
    for command in COMMANDS.values():
        assert main(command(run)) in (0, 1, 2)
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        assert "of somebody else" not in told.out + told.err
        assert not {"\x1b", "\u202e"} & set(told.out + told.err)
        if placed.startswith(("nested", "many", "digits")):
            assert max(map(len, (told.out + told.err).splitlines()), default=0) < 1000
    assert time.monotonic() - began < 20


WRONG = [None, True, 7, 10**400, "x", [], [1], {}, {"a": 1}, [{}], "\u202e\x1b[31m"]


@pytest.mark.slow_unit
@pytest.mark.parametrize("field", ["verdict", "diagnosis", "engine", "versions", "config", "windows", "text", "step"])
def test_a_bundle_of_wrong_types_is_refused_by_its_field_or_told(run, capsys, field):
    path = run / "parity" / "incidents" / "step-2" / "incident.json"
    good = path.read_text()
    inner = [None] if field != "diagnosis" else [None, *json.loads(good)["diagnosis"]]
    for value in WRONG:
        for name in inner:
            content = json.loads(good)
            if name is None:
                content[field] = value
            else:
                content[field][name] = value
            path.write_text(json.dumps(content))
            code = main(["report", str(path.parent)])
            told = capsys.readouterr()
            assert "Traceback" not in told.err
            assert not {"\x1b", "\u202e"} & set(told.out + told.err)
            assert code == 0 or (field in told.err and str(path) in told.err), (value, name, told.err)


def refusal(run):
    try:
        recorded_config(run)
    except ConfigError as e:
        return str(e)


@pytest.mark.slow_unit
def test_settings_of_wrong_types_are_refused_by_name_and_the_windows_told(run, capsys):
    path = run / "parity" / "config.json"
    good = json.loads(path.read_text())
    for name in good:
        for value in WRONG:
            path.write_text(json.dumps(good | {name: value}))
            assert str(path) in (refusal(run) or str(path)), (name, value)
    path.write_text(json.dumps(good | {"rules": WRONG[-1], "console": WRONG[-1]}))
    assert (main(["report", str(run)]), main(["replay", str(run)])) == (0, 2)
    told = capsys.readouterr()
    assert str(path) in told.err
    assert not {"\x1b", "\u202e"} & set(told.out + told.err)


@pytest.mark.slow_unit
def test_memory_is_bounded_before_anything_is_parsed(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"[" + b"[]," * 10_000_000 + b"[]]")  # 30 MB that would become a gigabyte
    content = read_bytes(path)
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 1,000,000 values"):
        parse_json(content)
    assert window_of(content[: 1 << 22]) is None
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    with pytest.raises(ValueError, match=r"\d bytes"):
        read_bytes(path, 1000)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]),
         "100,000 values"),
        ("a: &a [*a]", "deep"),
        ("\n".join(["m0: &m0 {a: 1, b: 2}", *(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" for i in range(1, 60))]),
         "100,000 values"),
        ("[" * 5000, "deep"),
        ("a: " + "9" * 400, "a is a number of about 400 digits"),
        ("a: " + "9" * 5000, "not valid YAML"),
    ],
    ids=["aliases", "itself", "merges", "nested", "digits", "more-digits"],
)  # fmt: skip
def test_yaml_is_bounded_before_it_is_made(text, told):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=told):
        from_yaml(text, "settings.yaml")
    assert time.monotonic() - began < 20  # on a machine with much else to do
    assert from_yaml("a: &a {b: 1}\nc: {<<: *a, d: *a}", "x") == {"a": {"b": 1}, "c": {"b": 1, "d": {"b": 1}}}


def test_a_link_within_the_folder_is_followed_and_one_out_of_it_only_where_nobody_minds(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "real").write_text("x")
    (tmp_path / "inside").symlink_to("data/real")
    (tmp_path / "data" / "outside").symlink_to("../inside")
    with open_regular(tmp_path / "inside", within=True) as file:
        assert file.read() == b"x"
    (tmp_path / "sibling").write_text("y")
    (tmp_path / "data" / "up").symlink_to("../sibling")
    with pytest.raises(OSError, match="link out of its folder"):
        open_regular(tmp_path / "data" / "up", within=True)
    with open_regular(tmp_path / "data" / "up") as file:
        assert file.read() == b"y"


def test_kinds_name_the_field():
    kinds = {"a": int, "b?": [{"c": NUMBER}], "d?": str | None}
    require_kinds({"a": 1, "b": [{"c": "inf"}, {"c": None}, {"c": 0.5}], "d": None, "more": []}, kinds)
    for value, told in (
        ([], "it as list"), ({}, "no a"), ({"a": True}, "a as bool"), ({"a": 1, "b": {}}, "b as dict"),
        ({"a": 1, "b": [{"c": 1}, {"c": "x"}]}, r"b\[1\]\.c as str"), ({"a": 1, "b": [{}]}, r"no b\[0\]\.c"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            require_kinds(value, kinds)
