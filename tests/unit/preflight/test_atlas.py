"""What an atlas keeps, and how it says it. The pairs themselves: ``tests/engine/test_atlas.py``."""

import multiprocessing
import os
import signal
import time

import pytest

from trl_parity.errors import ConfigError
from trl_parity.preflight.atlas import atlas
from trl_parity.preflight.atlas.atlas import Row, run_atlas, table


def test_the_table_says_who_deviates_from_where_and_why_the_others_are_missing():
    apart = {"mean": 0.068, "max": 0.94, "first": 16}
    near = {"mean": 1e-7, "max": 2.3e-6, "first": None}
    rows = [
        Row("qwen3", "Qwen3ForCausalLM", "agrees", prefill=near, decode=near, sync=near),
        Row("jamba", "JambaForCausalLM", "not loaded", why="ValueError: a | b"),
        Row("cohere2", "Cohere2ForCausalLM", "deviates", prefill=apart, decode=apart, sync=apart),
    ]
    lines = table(rows).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| cohere2", "| qwen3", "| jamba"]
    assert "9.4e-01 from token 17 on" in lines[0]
    assert "2.3e-06 | 2.3e-06 | 2.3e-06" in lines[1]
    assert "a \\| b" in lines[2]


def test_a_model_type_that_transformers_has_not_is_refused():
    with pytest.raises(ConfigError, match="no causal language model of type qwen33"):
        run_atlas(["qwen33"], None, timeout=1.0)


@pytest.mark.slow_unit
@pytest.mark.parametrize(
    ("does", "why"),
    [("hangs", "no answer in"), ("dies", "its process ended with signal 9"), ("leaves", "ended with exit code 3")],
)
def test_a_process_that_hangs_or_dies_is_a_row_like_any_other(monkeypatch, does, why):
    monkeypatch.setattr(atlas, "_compared", {"hangs": _hangs, "dies": _dies, "leaves": _leaves}[does])
    monkeypatch.setattr(atlas, "PRELOADED", ())
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind, get=multiprocessing.get_context: get("fork"))
    monkeypatch.setattr(type(multiprocessing.get_context("fork")), "set_forkserver_preload", lambda *_: None)
    found = atlas._in_a_process(int, int, timeout=0.5 if does == "hangs" else 60.0)
    assert found["outcome"] == "lost"
    assert why in found["why"]


def _hangs(*_):
    time.sleep(60.0)


def _dies(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _leaves(*_):
    os._exit(3)
