"""What makes a check short: a chunk size told to an engine that runs, a second thread, and what is said meanwhile."""

import threading
from types import SimpleNamespace

import pytest
import torch

from trl_parity.engine.offline import BenchEngine, Sampled
from trl_parity.errors import InterceptionError
from trl_parity.lines import about
from trl_parity.preflight.check import left
from trl_parity.preflight.check.aside import Aside
from trl_parity.preflight.check.engines import variant_rows
from trl_parity.preflight.check.invariances import Ask, Noise
from trl_parity.preflight.check.rows import Limits, RowVerdict


class Scheduler:
    """As far as ``taking_in`` knows it: at each step as much as its budget allows, or as ``heeds`` says."""

    def __init__(self, heeds=True):
        self.max_num_scheduled_tokens, self._heeds = 2048, heeds

    def schedule(self):
        return SimpleNamespace(total_num_scheduled_tokens=self.max_num_scheduled_tokens if self._heeds else 2048)


def engine_of(scheduler, chunks=True):
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    config = SimpleNamespace(scheduler_config=SimpleNamespace(enable_chunked_prefill=chunks))
    return BenchEngine(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core, vllm_config=config)))


def test_a_running_engine_takes_in_fewer_tokens_a_step_and_then_as_many_as_before():
    engine = engine_of(scheduler := Scheduler())
    with engine.taking_in(16):
        assert engine.chunk_size == 16
        assert scheduler.schedule().total_num_scheduled_tokens == 16
    assert engine.chunk_size == 2048
    assert "schedule" not in vars(scheduler)


def test_an_engine_that_does_not_heed_it_or_never_chunks_is_told_apart():
    engine = engine_of(scheduler := Scheduler(heeds=False))
    with (
        pytest.raises(InterceptionError, match="took in 2048 tokens, and was told to take in 16"),
        engine.taking_in(16),
    ):
        scheduler.schedule()
    engine = engine_of(Scheduler(), chunks=False)
    with pytest.raises(InterceptionError, match="enable_chunked_prefill: false"), engine.taking_in(16):
        pass


def answers(shift=0.0):
    law = torch.linspace(-1, 1, 8)[None].log_softmax(-1)
    return [Sampled((3,), law[0, 3:4].double() + shift, (law + shift * torch.arange(8)).log_softmax(-1), 0)]


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, RowVerdict.PASS), (0.1, RowVerdict.FAIL)])
def test_rows_of_answers_at_hand_build_no_engine(shift, verdict):
    def build(over):
        raise AssertionError("no engine is needed")

    rows = variant_rows(
        build, {"eager": True, "block_size": 128, "chunk_size": 2048}, Ask(((1,) * 90,), (0,), 1), answers(),
        Noise(1e-12, "float32", Limits()), lambda: 1e9, ["compiled", "chunked_prefill", "block_size"],
        chunked=answers(shift), other_block=(answers(shift), 64),
    )  # fmt: skip
    rows = {row.id: row for row in rows}
    assert list(rows) == ["compiled", "chunked_prefill", "block_size"]
    assert rows["compiled"].verdict is RowVerdict.NOT_RUN
    assert rows["chunked_prefill"].verdict is rows["block_size"].verdict is verdict
    assert "2,048 and 30 tokens a step" in rows["chunked_prefill"].evidence
    assert "blocks of 128 and 64 tokens" in rows["block_size"].evidence


def test_the_reference_has_a_thread_where_there_is_a_core_for_it(monkeypatch):
    for device, threads, apart in (("cpu", 1, True), ("cpu", 2, False), ("cuda", 2, True)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        aside = Aside(device, "cpu")
        results = [aside.begin(lambda i=i: (i, threading.current_thread())) for i in range(3)]
        assert [result()[0] for result in results] == [0, 1, 2]
        assert (results[0]()[1] is not threading.current_thread()) is apart
        aside.close()


def test_what_breaks_in_the_thread_breaks_where_it_is_asked_for():
    def broken():
        raise RuntimeError("the reference broke")

    result = Aside("cuda", "cpu").begin(broken)
    with pytest.raises(RuntimeError, match="the reference broke"):
        result()


def test_time_left_is_told_at_once_and_follows_what_was_timed(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(left.time, "monotonic", lambda: now[0])
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    time_left = left.TimeLeft(str(tmp_path), ("baseline",))
    first = time_left("starting", 0, 0)
    assert 5 < first < 60
    time_left("starting the engine", 0, 0)
    now[0] += 30.0  # and not 3
    assert time_left("loading the reference", 0, 0) > first
    time_left("trials", 1, 17)
    for done in range(2, 18):  # two seconds each
        now[0] += 2.0
        seconds = time_left("trials", done, 17)
    ahead = time_left("drift", 0, 0)
    assert seconds == pytest.approx(ahead)
    told = [ahead]
    for stage in ("sampling", "lengths", "own", "update", "engines"):
        now[0] += 5.0
        told.append(time_left(stage, 0, 0))
    assert told == sorted(told, reverse=True)
    assert time_left("other engines", 1, 2) == pytest.approx(told[-1] / 2)
    assert time_left("other engines", 2, 2) == 0.0


def test_seconds_in_words():
    assert [about(s) for s in (0.0, 44.0, 94.0, 96.0, 1000.0)] == [
        "about 10 s left", "about 40 s left", "about 90 s left", "about 2 min left", "about 17 min left",
    ]  # fmt: skip
