"""A tracker that fails now and then: what people are to be told reaches them."""

from types import SimpleNamespace

import pytest
from support.windows import verdict

from trl_parity.tracking import sinks
from trl_parity.tracking.sinks import WandbSink
from trl_parity.verdict import Status, Verdict


class Run:
    """Takes alerts, but for the calls numbered in ``bad``."""

    def __init__(self, bad):
        self.bad, self.calls, self.sent = bad, 0, []
        self.summary = SimpleNamespace(update=lambda values: self._take(values["parity/verdict"]))

    def _take(self, what):
        self.calls += 1
        if self.calls in self.bad:
            raise ConnectionError("hiccup")
        self.sent.append(what)

    def alert(self, title, text, level):
        self._take(title)


def halt(step):
    return Verdict(step=step, status=Status.HALT, streak=3)


@pytest.fixture
def sink_of(monkeypatch):
    monkeypatch.setattr(sinks, "_PAUSES", (0.0, 0.0, 0.0))

    def of(bad):
        sink = WandbSink.__new__(WandbSink)
        sinks._GuardedSink.__init__(sink)
        sink._module = SimpleNamespace(run=Run(bad), AlertLevel=SimpleNamespace(ERROR=1, WARN=0))
        return sink, sink._module.run

    return of


def test_one_hiccup_silences_neither_this_alert_nor_later_ones(sink_of, caplog):
    sink, run = sink_of(bad={1})
    sink.alert(verdict(1), "first")
    for step in (1, 2, 3):
        sink.tell(f"window {step}")  # the first call rests, the second sends what waits
    sink.alert(verdict(4), "second")
    alerts = [title for title in run.sent if title.startswith("trl-parity")]
    assert alerts == ["trl-parity OK at step 1", "trl-parity OK at step 4"]
    assert run.sent[1] == "window 2"
    assert caplog.text.count("wandb failed") == 1


def test_a_halt_is_tried_again_at_once_and_whatever_failed_before(sink_of):
    sink, run = sink_of(bad=set(range(1, 12)))
    for step in range(1, 60):
        sink.tell(f"window {step}")
    assert run.calls < 8  # a tracker that is down is not asked each time
    sink, run = sink_of(bad=set(range(1, 6)))
    for step in range(1, 8):
        sink.tell(f"window {step}")  # 1, then after 1, 3, ... left out
    before = run.calls
    sink.alert(halt(9), "halted")
    assert run.sent == ["trl-parity HALT at step 9"], run.calls - before


def test_what_could_not_be_sent_is_sent_at_the_end_once(sink_of):
    sink, run = sink_of(bad={1, 2, 3})
    sink.alert(halt(1), "halted")
    assert run.sent == []
    sink.flush()
    sink.flush()
    assert run.sent == ["trl-parity HALT at step 1"]
