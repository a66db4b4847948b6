"""A checkpoint that 0.6.0 saved, with a streak, a noise floor and half a window, is gone on from."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from support import TESTS

from trl_parity import ParityCallback, ParityConfig
from trl_parity.metrics.statistics import compute
from trl_parity.records import SamplingSettings, ScoredBatch

SAVED = json.loads((TESTS / "data" / "checkpoint_0.6.0.json").read_text())
CALLBACK = SAVED["stateful_callbacks"]["ParityCallback"]
CHECKPOINT = CALLBACK["attributes"]["checkpoint"]


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    """No engine will be built: vLLM need not be imported to prepare for one."""
    monkeypatch.setattr("trl_parity.live.callback.prepare_cpu_engine", lambda: False)


def resumed(tmp_path, stateful_callbacks, **changed):
    """A callback with the run's settings, told by the trainer that training goes on at the checkpoint's step."""
    callback = ParityCallback(**(CALLBACK["args"] | {"rules": None} | changed))
    args = SimpleNamespace(output_dir=str(tmp_path), report_to=[], device=torch.device("cpu"), world_size=1)
    state = SimpleNamespace(
        global_step=SAVED["global_step"], stateful_callbacks=stateful_callbacks, is_world_process_zero=True
    )
    callback.on_train_begin(args, state, SimpleNamespace())
    return callback


def bad_batch(shift=0.5):
    rollout = torch.full((16, 24), -1.0)
    trainer = rollout + shift
    return ScoredBatch(
        mask=torch.ones(16, 24, dtype=torch.bool), rollout_logprobs=rollout, trainer_logprobs=trainer,
        own_logprobs=trainer, entropy=torch.ones(16, 24),
    )  # fmt: skip


def test_the_checkpoint_is_of_the_middle_of_a_streak_and_of_a_window():
    assert SAVED["made_by"].startswith("trl-parity 0.6.0")
    assert CHECKPOINT["breaker"] == {"streak": 2, "needed": 3, "windows": 2, "alerted": "WARN"}
    assert (CHECKPOINT["open_batches"], CHECKPOINT["window_start"], CHECKPOINT["sequences"]) == (1, 4, 80)
    assert CHECKPOINT["floor"]["sources"]


def test_its_settings_are_read_as_they_were():
    config = ParityConfig.from_mapping(CALLBACK["args"])
    assert (config.every_n_steps, config.bootstrap_samples, config.truncation, config.action) == (
        2,
        20,
        "ignore",
        "log",
    )
    later = {name: value for name, value in ParityConfig().to_dict().items() if name not in CALLBACK["args"]}
    assert config.to_dict() == CALLBACK["args"] | later
    assert ParityConfig(**CALLBACK["args"]).resolved_rules() == ParityConfig().resolved_rules()


@pytest.mark.parametrize("wrapped", [False, True])  # transformers keeps one as it is, several of a class in a list
def test_streak_floor_and_the_open_window_go_on(tmp_path, wrapped):
    callback = resumed(tmp_path, {"ParityCallback": [CALLBACK] if wrapped else CALLBACK})
    monitor, window = callback.monitor, callback._pipeline.window
    assert monitor.breaker.state() == CHECKPOINT["breaker"]
    assert (window.start, window.batches) == (4, 1)
    half = window.sums("cpu").totals()
    assert half["tokens"] == 384.0
    assert window.sums("cpu").to_sparse() == CHECKPOINT["window"]

    # what a checkpoint saved now would hold: all of it, in the same words
    again = copy.deepcopy(callback.state()["attributes"]["checkpoint"])
    assert again.keys() == CHECKPOINT.keys()
    for part in CHECKPOINT.keys() - {"window"}:  # whose sums are taken over all ranks first
        assert again[part] == CHECKPOINT[part], part

    # the floor is in force and is not measured anew
    sources = CHECKPOINT["floor"]["sources"]
    for stat in ("kl_k3", "logp_abs_diff/mean"):
        assert monitor.floor.values[f"floor/{stat}"] == max(found[stat] for found in sources.values())
    assert not monitor.floor.due

    # the second half of the window: the streak's third breach
    window.add(monitor.sums_of(bad_batch(), 0), "")
    assert window.sums("cpu").totals()["tokens"] == 768.0
    verdict = monitor.judge(6, monitor.scalars(compute(window.sums("cpu")), new_window=True))
    assert (verdict.step, str(verdict.status), verdict.streak, verdict.alert) == (6, "HALT", 3, "HALT")
    assert verdict.stats.num_tokens == 768
    monitor.close()
    [line] = map(json.loads, (tmp_path / "parity" / "metrics.jsonl").read_text().splitlines())
    assert (line["step"], line["status"], line["streak"], line["num_batches"]) == (6, "HALT", 3, 2)


def test_with_other_resamples_the_half_window_is_dropped_and_the_streak_kept(tmp_path, caplog):
    callback = resumed(tmp_path, {"ParityCallback": CALLBACK}, bootstrap_samples=30)
    assert callback.monitor.breaker.streak == 2
    assert callback._pipeline.window.batches == 0
    assert "bootstrap_samples changed" in caplog.text
    callback.monitor.close()


@pytest.mark.parametrize(
    ("truncation", "sampling", "told"),
    [("ignore", {"top_p": 0.9}, False), ("replay", {}, False), ("replay", {"presence_penalty": 1.0}, True)],
)
def test_a_run_judged_otherwise_from_here_on_says_so_where_that_is_another_law(
    tmp_path, caplog, truncation, sampling, told
):
    callback = resumed(tmp_path, {"ParityCallback": CALLBACK}, truncation=truncation)
    callback._run.trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)))
    callback._run.say_start(SamplingSettings(**sampling))
    assert ("truncation='ignore' up to the checkpoint, and is with 'replay' from here on" in caplog.text) == told
    callback.monitor.close()


def test_without_a_state_the_run_begins_anew_and_says_so(tmp_path, caplog):
    callback = resumed(tmp_path, {})
    assert callback.monitor.breaker.streak == 0
    assert callback.monitor.floor.due
    assert "holds no trl-parity state this version reads" in caplog.text
    callback.monitor.close()
