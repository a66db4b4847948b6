"""ParityMonitor, the judge outside a trainer; the entropy, temperature and reward watches."""

import fcntl
import json
import math
import random

import pytest
import torch

from trl_parity import ParityMonitor, RewardBaseline
from trl_parity.errors import ConfigError, DataError
from trl_parity.metrics.scalars import FLOORED


def batch(seed, noise, shift=0.0, rows=16, columns=40, vocab=30):
    """Tokens sampled from a law, and how a noisy or shifted copy of the model scores them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, vocab, generator=generator) * 2
    law = logits.log_softmax(-1)
    tokens = torch.multinomial(law.exp().view(-1, vocab), 1, generator=generator).view(rows, columns, 1)
    other = (logits + noise * torch.randn(logits.shape, generator=generator)).log_softmax(-1)
    return {
        "rollout_logprobs": law.gather(-1, tokens).squeeze(-1),
        "trainer_logprobs": other.gather(-1, tokens).squeeze(-1) + shift,
        "entropy": -(other.exp() * other).sum(-1),
    }


def statuses(monitor):
    return [str(v.status) for v in monitor.verdicts]


def test_a_loop_of_ones_own_is_judged_and_kept(tmp_path):
    monitor = ParityMonitor(output_dir=tmp_path)
    for step in range(1, 4):
        assert not monitor.log_step(step, **batch(step, noise=0.01), rewards=[0.5, 1.0]).halted
    for step in range(4, 7):
        last = monitor.log_step(step, **batch(step, noise=1.0), rewards=[0.0])
    monitor.close()
    assert last.halted
    assert statuses(monitor) == ["OK"] * 3 + ["BREACH", "BREACH", "HALT"]
    summary = monitor.summary(4)
    assert summary["status"] == "HALT"
    assert summary["statuses"] == {"OK": 1, "BREACH": 2, "HALT": 1}
    assert summary["reward_mean"] == pytest.approx((0.75 + 0 + 0 + 0) / 4)
    assert summary["alerts"] == [{"step": 4, "level": "WARN"}, {"step": 6, "level": "HALT"}]
    assert summary["kl_k3"]["max"] > 0.05
    lines = [json.loads(line) for line in (tmp_path / "parity" / "metrics.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == statuses(monitor)
    assert json.loads((tmp_path / "parity" / "config.json").read_text())["consecutive"] == 3


def test_a_given_floor_is_what_excess_is_counted_from():
    noisy = dict.fromkeys(FLOORED, 0.0) | {"kl_k3": 0.02, "logp_abs_diff/mean": 0.1, "logp_abs_diff/p99": 0.5,
                                           "ratio/out_of_band": 0.5, "ess": 0.95}  # fmt: skip
    without, with_floor = ParityMonitor(), ParityMonitor(floor=noisy)
    for step in range(3):
        without.log_step(step, **batch(step, noise=0.2))
        with_floor.log_step(step, **batch(step, noise=0.2))
    assert statuses(without)[-1] == "HALT"
    assert statuses(with_floor) == ["OK"] * 3
    stats = with_floor.verdicts[-1].stats
    assert stats["excess/kl_k3"] == pytest.approx(stats["trimmed/kl_k3"] - 0.02)
    assert stats["excess/ess"] == pytest.approx(0.95 - stats["trimmed/ess"])


def test_masks_default_to_everything_and_nothing_is_no_data():
    monitor = ParityMonitor()
    full = monitor.log_step(1, **batch(0, noise=0.01))
    assert full.stats.num_tokens == 16 * 40
    empty = monitor.log_step(2, **batch(0, noise=0.01), mask=torch.zeros(16, 40))
    assert str(empty.status) == "NO_DATA"


@pytest.mark.parametrize(
    "wrong", [{"mask": torch.ones(16, 39)}, {"entropy": torch.ones(4)}, {"trainer_logprobs": torch.ones(16 * 40)}]
)
def test_contradicting_shapes_are_named(wrong):
    with pytest.raises(DataError, match="Expected one"):
        ParityMonitor().log_step(1, **(batch(0, noise=0.01) | wrong))


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'consecutive'"):
        ParityMonitor(consecutiv=2)
    with pytest.raises(ConfigError, match="floor names kl"):
        ParityMonitor(floor={"kl": 1.0})
    with pytest.raises(ConfigError, match="cannot read"):
        ParityMonitor(reward_baseline=str(tmp_path / "none.json"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="writable directory"):
        ParityMonitor(output_dir=tmp_path / "file")


@pytest.mark.slow_unit
def test_alerts_go_to_wandb_and_trackio_once_an_episode(tmp_path, monkeypatch):
    import trackio
    import wandb
    from support.wandb_server import inspect

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio.init(project="alerts", name="run", embed=False)
    wandb.init(mode="offline", dir=tmp_path)
    monitor = ParityMonitor(report_to=["wandb", "trackio"])
    raised = []
    real = trackio.alert
    monkeypatch.setattr(trackio, "alert", lambda **kwargs: raised.append(kwargs) or real(**kwargs))
    for step in range(1, 6):
        monitor.log_step(step, **batch(step, noise=1.0))
    wandb.finish()
    trackio.finish()
    assert [(a["title"], a["level"].value) for a in raised] == [
        ("trl-parity BREACH at step 1", "warn"),
        ("trl-parity HALT at step 3", "error"),
    ]
    lines = inspect(tmp_path)
    text = json.dumps(lines)
    logged = json.dumps([line for line in lines if line.get("type") == "history"])
    assert text.count("trl-parity BREACH at step 1") >= 1
    assert text.count("trl-parity HALT at step") >= 1
    assert "trl-parity HALT at step 4" not in text
    assert "parity/excess/kl_k3" not in logged  # no floor was given, so there is no excess
    assert "parity/trimmed/kl_k3" in logged


# ---- checkpoints ------------------------------------------------------------------------------------------------


def test_state_is_json_and_a_restored_monitor_goes_on_alike(tmp_path):
    first = ParityMonitor(floor={"kl_k3": 1e-4})
    for step in range(1, 3):
        first.log_step(step, **batch(step, noise=1.0), rewards=[1.0] * 16)
    second = ParityMonitor(floor={"kl_k3": 1e-4})
    assert second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    ours, theirs = (m.log_step(3, **batch(3, noise=1.0), rewards=[0.0] * 16) for m in (first, second))
    assert ours.halted
    assert ours.to_dict() == theirs.to_dict()


@pytest.mark.parametrize("state", [None, {}, {"state_version": 1, "breaker": {}}, {"state_version": 99}, "junk"])
def test_a_state_of_another_version_restarts_or_fails_by_choice(state):
    monitor = ParityMonitor()
    assert monitor.load_state(state) is False
    assert monitor.breaker.streak == 0
    with pytest.raises(ConfigError, match="on_state_mismatch='restart'"):
        ParityMonitor(on_state_mismatch="error").load_state(state)


def test_a_collapse_of_entropy_warns_and_does_not_halt():
    monitor = ParityMonitor()
    for step in range(1, 12):
        tokens = batch(step, noise=0.01)
        if step > 5:  # the law sampled from is all but certain now, on both sides
            tokens = {name: value * 1e-3 for name, value in tokens.items()}
        verdict = monitor.log_step(step, **tokens)
    assert "entropy/relative" in verdict.warnings
    assert str(verdict.status) == "WARN"
    assert verdict.streak == 0


def test_rewards_that_part_from_their_history_warn(tmp_path):
    rng = random.Random(0)
    history = tmp_path / "history.json"
    RewardBaseline.from_rewards([rng.gauss(0.5, 0.1) for _ in range(1000)]).save(history)
    same, parted = (ParityMonitor(reward_baseline=str(history)) for _ in range(2))
    for step in range(1, 30):
        near = same.log_step(step, **batch(step, noise=0.01), rewards=[rng.gauss(0.5, 0.1) for _ in range(64)])
        far = parted.log_step(step, **batch(step, noise=0.01), rewards=[rng.gauss(0.4, 0.1) for _ in range(64)])
    assert near.stats["reward/parted"] == 0.0
    assert abs(near.stats["reward/effect_size"]) < 0.1
    assert str(near.status) == "OK"
    assert far.stats["reward/parted"] == 1.0
    assert far.stats["reward/effect_size"] < -0.4
    assert far.warnings == ("reward/parted",)
    assert math.isclose(far.stats["reward/mean"], 0.4, abs_tol=0.1)


# ---- the folder of a run


def test_one_process_at_a_time_writes_a_runs_folder(tmp_path):
    monitor = ParityMonitor(output_dir=tmp_path)
    with open(tmp_path / "parity" / ".lock", "r+b") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        monitor.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as another process's
        with pytest.raises(ConfigError, match=r"parity is in use by process \d+ on .*set another output_dir"):
            ParityMonitor(output_dir=tmp_path)
    (left := tmp_path / "parity" / "incidents" / ".step-3.0123456789ab.tmp").mkdir(parents=True)
    ParityMonitor(output_dir=tmp_path).close()
    assert not left.exists()


def test_a_foreign_runs_links_lead_nowhere(tmp_path):
    (theirs := tmp_path / "theirs").mkdir()
    (theirs / "config.json").write_text("untouched")
    (run := tmp_path / "run").mkdir()
    (run / "parity").symlink_to(theirs)
    with pytest.raises(ConfigError, match="parity is a symbolic link, and what it points to is not written"):
        ParityMonitor(output_dir=run)
    ParityMonitor(parity_dir=str(run / "own")).close()  # what a user names may be one
    (run / "parity").unlink()
    (run / "parity").mkdir()
    for name in ("config.json", "run.json", "rewards.json"):
        (run / "parity" / name).symlink_to(theirs / "config.json")
    monitor = ParityMonitor(output_dir=run)
    monitor.log_step(1, **batch(1, noise=0.01), rewards=[0.1 * i for i in range(30)])
    monitor.write_run({"engine": {"url": "http://me:Zq81xVbn27Lk@host"}})
    monitor.close()
    assert [path.name for path in theirs.iterdir()] == ["config.json"]
    assert (theirs / "config.json").read_text() == "untouched"
    assert json.loads((run / "parity" / "run.json").read_text())["engine"]["url"] == "http://***@host"
