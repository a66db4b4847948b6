"""What is no verdict is none: whatever fails in a command ends with 2 and one line."""

import importlib

import pytest

from trl_parity.cli import COMMANDS, main

WORDS = {
    "check": ["--model", "m"], "atlas": [], "baseline": ["--model", "m", "--output", "o"], "engine": ["rl"],
    "lint": ["c.yaml"], "pilot": ["--output", "o"], "watch": ["runs"], "report": ["runs"], "compare": ["a", "b"],
    "replay": ["runs"], "panels": ["--project", "p"], "drill": ["--list"],
}  # fmt: skip


def failing(monkeypatch, command, error):
    def run(options):
        raise error

    monkeypatch.setattr(importlib.import_module(f"trl_parity.cli.{command}"), "run", run)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_crash_is_not_a_verdict(monkeypatch, capsys, command):
    failing(monkeypatch, command, ZeroDivisionError("by zero,\nsay"))
    assert main([command, *WORDS[command]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("trl-parity: ZeroDivisionError: by zero, say. ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError("disk"), 2, "OSError: disk"), (RecursionError("deep"), 2, "deep"), (MemoryError(), 2, "MemoryError"),
        (SystemExit(1), 2, "a library ended the process: 1"), (SystemExit("no GPU"), 2, "no GPU"),
        (KeyboardInterrupt(), 130, "interrupted"), (BrokenPipeError(), 2, ""),
    ],
)  # fmt: skip
def test_neither_is_what_a_library_or_the_user_ends(monkeypatch, capsys, error, code, told):
    failing(monkeypatch, "compare", error)
    assert main(["compare", "a", "b"]) == code
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == bool(told)


def test_the_traceback_is_shown_when_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("TRL_PARITY_DEBUG", "1")
    failing(monkeypatch, "compare", ZeroDivisionError())
    assert main(["compare", "a", "b"]) == 2
    assert "Traceback" in capsys.readouterr().err
