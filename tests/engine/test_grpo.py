"""ParityCallback on real GRPO with a real, colocated vLLM engine. One engine serves the whole module."""

import json
import math
import statistics

import pytest
import torch
from peft import LoraConfig
from support.callbacks import Recorder, jsonl, lose_sync, parameters, statuses
from support.models import save_tiny_model
from support.trainers import digit_reward, grpo_args, prompts, shared_engine
from transformers import TrainerCallback, set_seed

from trl_parity import ParityCallback, ParityHalt, Status
from trl_parity.errors import ConfigError, InterceptionError
from trl_parity.trainers.instrumentation import uninstrument

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def make_trainer(model_dir):
    """Trainers that share one engine, built by TRL with TRL's arguments; each run syncs its weights first."""
    import torch._dynamo.config
    from trl import GRPOTrainer

    def make(output_dir, *callbacks, cls=GRPOTrainer, trainer_kwargs=None, **args):
        return cls(
            model=str(model_dir),
            args=grpo_args(output_dir, **args),
            reward_funcs=digit_reward,
            train_dataset=prompts(),
            callbacks=list(callbacks),
            **(trainer_kwargs or {}),
        )

    compiled = torch._dynamo.config.patch(disable=False)  # pytest's own setattr would take the setting away at the end
    with pytest.MonkeyPatch.context() as patch, compiled, shared_engine():
        patch.setenv("TORCH_COMPILE_DISABLE", "0")  # this one engine compiled, as TRL builds it
        yield make


# ---- a clean run ------------------------------------------------------------------------------------------------


def test_a_clean_run_is_measured_on_every_batch_and_logged_everywhere(make_trainer, tmp_path, monkeypatch):
    from support.wandb_server import inspect

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    callback = Recorder(rich_every_n_windows=2)
    trainer = make_trainer(tmp_path, callback, report_to="wandb", max_steps=4)
    assert trainer.vllm_generation.llm.llm_engine.vllm_config.compilation_config.mode  # compiled, not eager
    generated, generate = [], trainer.vllm_generation.llm.generate
    monkeypatch.setattr(
        trainer.vllm_generation.llm, "generate", lambda *a, **k: generated.append(generate(*a, **k)) or generated[-1]
    )
    trainer.train()
    generated = [outputs for outputs in generated if outputs[0].prompt_logprobs is None]  # the floor's are re-scores
    import wandb

    wandb.finish()

    assert statuses(callback) == ["OK"] * 4
    assert callback.status is Status.OK
    # exactly what the engine said: ids, log-probs, masks
    assert len(callback.seen) == len(generated) == 4
    for (rollout, scored), outputs in zip(callback.seen, generated, strict=True):
        for row, output in enumerate(o for request in outputs for o in request.outputs):
            n = len(output.token_ids)
            assert rollout.completion_ids[row, :n].tolist() == list(output.token_ids)
            assert rollout.engine_mask[row].tolist() == [True] * n + [False] * (rollout.engine_mask.shape[1] - n)
            reported = [lp[t].logprob for lp, t in zip(output.logprobs, output.token_ids, strict=True)]
            torch.testing.assert_close(scored.rollout_logprobs[row, :n], torch.tensor(reported))
        assert (rollout.lag, rollout.sampling.temperature) == (0, 0.7)
    # metrics.jsonl
    lines = jsonl(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    sampled = [sum(len(o.token_ids) for request in outputs for o in request.outputs) for outputs in generated]
    assert [line["num_tokens"] for line in lines] == sampled
    assert all(line["kl_k3"] < 1e-3 for line in lines)
    # the trainer's log, and TRL's own number as a cross-check of ours
    history = [row for row in trainer.state.log_history if "parity/kl_k3" in row]
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    for row, line in zip(history, lines, strict=True):
        assert row["parity/kl_k3"] == pytest.approx(line["kl_k3"])
        assert row["parity/own_head/logp_abs_diff/mean"] == pytest.approx(
            row["sampling/sampling_logp_difference/mean"], rel=1e-4
        )
        assert row["parity/logp_abs_diff/max"] == pytest.approx(line["logp_abs_diff/max"])
        assert 0 < row["parity/cost/share"] < 1
    assert statistics.median(row["parity/cost/share"] for row in history) < 0.5  # one window may meet a busy machine
    # W&B, read back with its own command
    text = json.dumps(inspect(tmp_path))
    assert text.count("train/parity/kl_k3") >= 4
    assert "parity/log_ratio" in text
    assert "parity/worst_tokens" in text


def left_behind(*folders):
    """Everything under these folders as bytes by path; what is packed, unpacked as well."""
    import sqlite3

    import pyarrow.parquet
    from support.wandb_server import inspect

    out = {}
    for folder in folders:
        for path in (p for p in folder.rglob("*") if p.is_file() and "model_dir" not in p.parts):
            out[path] = path.read_bytes()
            if path.suffix == ".parquet":
                out[path] += json.dumps(pyarrow.parquet.read_table(path).to_pydict()).encode()
            elif path.suffix == ".db":
                with sqlite3.connect(path) as db:
                    tables = [row[0] for row in db.execute("select name from sqlite_master where type = 'table'")]
                    out[path] += repr([db.execute(f"select * from {name}").fetchall() for name in tables]).encode()
            elif path.suffix == ".wandb":
                out[path] += json.dumps(inspect(path.parent)).encode()
    return out


def as_bytes(ids):
    """How a run of token ids may look in a file: JSON with and without blanks, int64 and int32."""
    import struct

    plain = ", ".join(map(str, ids))
    return [plain.encode(), plain.replace(", ", ",").encode(), struct.pack(f"<{len(ids)}q", *ids),
            struct.pack(f"<{len(ids)}i", *ids)]  # fmt: skip


@pytest.mark.parametrize("redact", [True, False])
def test_a_redacted_run_leaves_no_prompt_completion_or_id_anywhere(make_trainer, tmp_path, monkeypatch, capfd, redact):
    """A halted run, W&B offline and trackio, its checkpoint, incident and reports: all that is on the disk after it.

    Without redaction the same search finds them: it can.
    """
    import wandb
    from datasets import Dataset
    from support.wandb_server import inspect

    from trl_parity.cli import main

    wandb.teardown()  # else a client that has begun keeps the folder of an earlier test
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    database = tmp_path / "trackio"
    for module in ("trackio", "trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", database, raising=False)
    marker = "zebra quokka xylophone"
    completions = []

    def reward(completions_, **kwargs):
        completions.extend(completions_)
        return digit_reward(completions_)

    callback = Recorder(redact_text=redact, truncation="ignore", consecutive=2, rich_every_n_windows=1)
    trainer = make_trainer(
        tmp_path / "run", callback, report_to=["wandb", "trackio"], run_name="redacted", max_steps=3, top_p=0.8,
        learning_rate=1e-6, save_strategy="steps", save_steps=1, project="parity-redaction",
    )  # fmt: skip
    trainer.train_dataset = Dataset.from_list([{"prompt": f"{marker} {i % 10}+{i // 10}="} for i in range(64)])
    trainer.reward_funcs = [lambda completions, **kwargs: reward(completions, **kwargs)]
    trainer.train()
    wandb.finish()  # trackio's callback has done so
    assert statuses(callback) == ["BREACH", "HALT"]
    run = tmp_path / "run"
    printed = capfd.readouterr()
    for options in ([], ["--html", str(tmp_path / "r.html")], ["--markdown", str(tmp_path / "r.md")]):
        assert main(["report", str(run), *options]) == 0
    printed = (printed.out + printed.err + capfd.readouterr().out).encode()

    found = left_behind(run, tmp_path / "wandb", database) | {tmp_path / "printed": printed}
    found |= {p: p.read_bytes() for p in (tmp_path / "r.html", tmp_path / "r.md")}
    kinds = {"".join(p.suffixes[-1:]) for p in found}
    assert {".jsonl", ".json", ".parquet", ".wandb", ".db", ".html", ".md", ".png", ".safetensors"} <= kinds
    for level in ("BREACH at step 1", "HALT at step 2"):  # alerts, at WARN and at HALT
        assert any(level.encode() in content for path, content in found.items() if path.suffix == ".db")
        assert level in json.dumps(inspect(tmp_path / "wandb"))

    secrets = {marker: [marker.encode(), b"quokka", b"xylophone"]}
    for text in completions:
        parts = (text[i : i + 10] for i in range(0, len(text) - 10, 5))  # "6666666666" is in 2/3, too
        secrets[text] = [p.encode() for p in parts if len(set(p)) > 5 and sum(map(str.isalpha, p)) > 2]
    for rollout, _ in callback.seen:
        for row, mask in zip(rollout.completion_ids.tolist(), rollout.completion_mask.bool().tolist(), strict=True):
            ids = [i for i, m in zip(row, mask, strict=True) if m]
            if len(set(ids)) > 5:
                chunks = [
                    ids[i : i + 6] for i in range(0, len(ids) - 6, 6)
                ]  # "8, 8, 8, 8" is a sequence's number, too
                secrets[f"ids {ids}"] = [form for c in chunks if len(set(c)) > 3 for form in as_bytes(c)]
        prompt = rollout.prompt_ids[0][rollout.prompt_mask[0].bool()].tolist()
        secrets[f"prompt ids {prompt}"] = as_bytes(prompt[:8])
    assert sum(map(bool, secrets.values())) > 10  # there is something to look for
    leaks = {(path.relative_to(tmp_path), name[:40]) for path, content in found.items()
             for name, forms in secrets.items() if any(form in content for form in forms)}  # fmt: skip
    columns = [json.loads(content)["columns"] for path, content in found.items() if path.name.endswith(".table.json")]
    assert columns
    if redact:
        assert not leaks
        assert not [c for table in columns for c in table if c in ("token", "token_id", "prompt", "sequence_text")]
    else:
        assert {"tokens.parquet", "report.md", "r.html"} <= {path.name for path, _ in leaks}
        assert any("token_id" in table for table in columns)


def test_panels_are_made_at_the_first_step_of_an_online_run(make_trainer, tmp_path, monkeypatch, caplog):
    import wandb
    from support.wandb_server import Server

    wandb.teardown()  # else a client that has begun keeps its server
    with Server() as server:
        for name, value in (("BASE_URL", server.url), ("API_KEY", "x" * 40), ("MODE", "online"), ("DIR", tmp_path)):
            monkeypatch.setenv(f"WANDB_{name}", str(value))
        trainer = make_trainer(tmp_path / "run", ParityCallback(panels=True), report_to="wandb", max_steps=1)
        try:
            trainer.train()
        finally:
            wandb.finish()
            wandb.teardown()
    assert server.upserts == len(server.views) == 1
    assert any("train/parity/kl_k3" in row for row in server.history)
    assert "no W&B panels" not in caplog.text


def test_no_backbone_forward_is_added(make_trainer, tmp_path):
    counts = {}
    arms = {"with": [ParityCallback(floor_tokens=0)], "without": [], "with floor": [ParityCallback()]}
    for name, callbacks in arms.items():
        trainer = make_trainer(tmp_path / name, *callbacks, max_steps=2, per_device_train_batch_size=8)
        calls = []
        trainer.model.base_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        counts[name] = len(calls)
    assert counts["with"] == counts["without"] > 0
    assert counts["with floor"] == counts["without"] + 1 + 1 + 4  # once: plain, rounded, four sequences singly


def test_uninstrumented_classes_are_trls_own(make_trainer, tmp_path):
    from trl import GRPOTrainer

    ParityCallback()
    ParityCallback()  # idempotent
    wrapped = GRPOTrainer._generate_and_score_completions
    uninstrument()
    try:
        own = GRPOTrainer._generate_and_score_completions
        assert own is wrapped.__wrapped__
        assert not hasattr(own, "__wrapped__")
        uninstrument()
    finally:
        ParityCallback()
    assert GRPOTrainer._generate_and_score_completions.__wrapped__ is own


@pytest.mark.parametrize("dropout", ["none", "attention", "lora"])
def test_training_is_bit_equal_with_and_without_the_callback(make_trainer, tmp_path, dropout):
    """With dropout: a pass of our own in training mode at each batch, breaches, floors and diagnoses."""
    adapters = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", lora_dropout=0.3)
    weights = {}
    for name in ("with", "without"):
        set_seed(0)  # of the adapters
        trainer = make_trainer(
            tmp_path / name,
            *([ParityCallback(action="log")] if name == "with" else []),
            max_steps=3,
            generation_kwargs={"seed": 7},
            vllm_importance_sampling_correction=dropout == "none",
            trainer_kwargs={"peft_config": adapters} if dropout == "lora" else {},
        )
        for module in trainer.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1 if dropout == "attention" else 0.0
        trainer.train()
        weights[name] = parameters(trainer)
    assert (dropout == "lora") == any("lora_" in name for name in weights["with"])
    for name, value in weights["with"].items():
        assert torch.equal(value, weights["without"][name]), name


# ---- the noise floor --------------------------------------------------------------------------------------------


def test_a_run_on_a_budget_scores_a_sample_of_the_tokens_and_is_the_same_run(make_trainer, tmp_path):
    runs = []
    for name, budget in (("all", 1.0), ("sample", 0.0)):
        callback = Recorder(cost_budget=budget, cost_min_tokens=24)
        trainer = make_trainer(tmp_path / name, callback, max_steps=4, learning_rate=1e-5)
        trainer.train()
        weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        runs.append((callback, weights, jsonl(tmp_path / name)))
    (every, weights, lines), (some, same, sampled) = runs
    assert statuses(every) == statuses(some) == ["OK"] * 4
    assert all(torch.equal(one, other) for one, other in zip(weights, same, strict=True))
    assert [line["cost/coverage"] for line in lines] == [1.0] * 4
    assert sampled[0]["cost/coverage"] == 1.0
    for line, other in zip(sampled[1:], lines[1:], strict=True):
        assert 24 / line["num_tokens"] <= line["cost/coverage"] < 0.5
        assert line["num_tokens"] == other["num_tokens"]
        for stat in ("kl_k1", "kl_k3", "logp_abs_diff/mean", "entropy/drift"):  # of 48 tokens
            assert abs(line[stat] - other[stat]) < 4 * line[f"se/{stat}"], stat
        assert line["se/entropy/drift"] > 1.2 * other["se/entropy/drift"]
        for stat in ("own_head/kl_k3", "entropy/rollout", "last_token/logp_abs_diff/mean"):  # no sample
            assert line[stat] == pytest.approx(other[stat], rel=1e-5), stat
        assert line["ess"] == pytest.approx(other["ess"], rel=0.01)


def test_the_floor_is_measured_once_logged_and_taken_off(make_trainer, tmp_path):
    callback = ParityCallback()
    trainer = make_trainer(tmp_path, callback, max_steps=3, learning_rate=1e-5)
    trainer.train()
    lines = jsonl(tmp_path)
    assert [line["floor/age"] for line in lines] == [0, 1, 2]
    assert len({line["floor/kl_k3"] for line in lines}) == 1
    for line, row in zip(lines, [r for r in trainer.state.log_history if "parity/kl_k3" in r], strict=True):
        # the yardstick fits: a clean run's own drift is about as large
        assert 0.2 < line["trimmed/logp_abs_diff/mean"] / line["floor/logp_abs_diff/mean"] < 3
        assert line["excess/kl_k3"] == pytest.approx(line["trimmed/kl_k3"] - line["floor/kl_k3"])
        assert row["parity/excess/kl_k3"] == pytest.approx(line["excess/kl_k3"])
        assert row["parity/floor/kl_k3"] == line["floor/kl_k3"]
    assert set(callback.monitor.floor.sources) == {"rounding", "batch_shape", "engine"}
    assert all(line["cost/share"] < 0.2 for line in lines)  # the floor's seconds are not in it
    shares = [line["cost/floor_share"] for line in lines]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("fault", [{"top_p": 0.9}, {"generation_kwargs": {"temperature": 1.3}}])
def test_a_run_sick_from_its_first_batch_does_not_calibrate_itself_healthy(make_trainer, tmp_path, fault):
    floors = []
    for name, arguments in (("sick", fault), ("clean", {})):
        callback = ParityCallback(truncation="ignore", action="log")
        make_trainer(tmp_path / name, callback, max_steps=3, learning_rate=1e-5, **arguments).train()
        floors.append(callback.verdicts[-1].stats["floor/logp_abs_diff/mean"])
        assert statuses(callback) == (["BREACH", "BREACH", "HALT"] if name == "sick" else ["OK"] * 3)
    assert floors[0] < 2.5 * floors[1]


def test_a_layer_left_in_training_mode_is_drift_and_no_floor(make_trainer, tmp_path, caplog):
    callback = ParityCallback()
    trainer = make_trainer(tmp_path, callback, max_steps=4, learning_rate=1e-5)
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    trainer.train()
    assert statuses(callback) == ["BREACH", "BREACH", "HALT"]
    assert "dropout 0.2 switched on" in caplog.text


def test_settings_are_read_from_the_live_engine_and_trainer(make_trainer, tmp_path):
    from trl_parity.lint.facts import facts

    seen = []

    class Reader(ParityCallback):
        def on_generation(self, capture):
            super().on_generation(capture)
            seen.append(facts(capture, replayed=True))

    make_trainer(tmp_path, Reader(), max_steps=1).train()
    (f,) = seen
    assert (f.logprobs_mode, f.engine_dtype, f.engine_head_dtype) == ("processed_logprobs", "bfloat16", "bfloat16")
    assert (f.trainer_dtype, f.compute_dtype, f.trainer_head_fp32) == ("float32", "bfloat16", False)
    assert (f.kv_cache_dtype, f.quantization, f.dropout) == ("auto", None, 0.0)
    assert f.sampling.temperature == f.trainer_temperature == 0.7


def test_a_floor_that_cannot_be_measured_leaves_windows_calibrating_and_the_run_alive(
    make_trainer, tmp_path, monkeypatch, caplog
):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr("trl_parity.live.trainer_run.measure_floor", broken)
    callback = ParityCallback()
    trainer = make_trainer(tmp_path, callback, max_steps=2)
    trainer.train()
    assert statuses(callback) == ["CALIBRATING"] * 2
    assert trainer.state.global_step == 2
    assert caplog.text.count("noise floor could not be measured: RuntimeError: out of memory, say") == 1
    assert callback.verdicts[-1].stats.get("floor/kl_k3") is None


def test_the_temperature_really_sent_is_checked_against_trainer_and_phase(make_trainer, tmp_path):
    callback = ParityCallback(temperatures={"train": 0.7, "train@1": 0.9})
    make_trainer(tmp_path, callback, max_steps=2, learning_rate=1e-6).train()
    first, second = callback.verdicts
    assert (first.stats["temperature/engine"], first.stats["temperature/trainer"]) == (0.7, 0.7)
    assert first.stats["temperature/gap"] == 0
    assert (str(second.status), second.warnings) == ("WARN", ("temperature/gap",))
    assert second.stats["temperature/gap"] == pytest.approx(0.2)

    callback = ParityCallback(action="log")
    kwargs = {"temperature": 0.8}
    make_trainer(tmp_path / "b", callback, max_steps=1, learning_rate=1e-6, generation_kwargs=kwargs).train()
    assert callback.verdicts[0].stats["temperature/engine"] == 0.8
    assert "temperature/gap" in callback.verdicts[0].warnings


def test_rewards_are_those_trl_logs_and_are_compared_with_a_history(make_trainer, tmp_path):
    from trl_parity import RewardBaseline

    RewardBaseline.from_rewards([0.9 + 0.001 * i for i in range(100)]).save(tmp_path / "history.json")
    callback = ParityCallback(reward_baseline=str(tmp_path / "history.json"))
    trainer = make_trainer(tmp_path, callback, max_steps=2, learning_rate=1e-6)
    trainer.train()
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert [line["reward/mean"] for line in jsonl(tmp_path)] == pytest.approx(logged, rel=1e-5)
    last = callback.verdicts[-1]
    assert last.stats["reward/effect_size"] < -0.9
    assert last.warnings == ("reward/parted",)
    assert (tmp_path / "parity" / "rewards.png").read_bytes().startswith(b"\x89PNG")


# ---- faults of the real stack -----------------------------------------------------------------------------------


def test_a_lost_weight_sync_halts_with_a_checkpoint_and_a_reason(make_trainer, tmp_path, monkeypatch, capfd):
    lose_sync(monkeypatch)
    callback = ParityCallback()
    trainer = make_trainer(tmp_path, callback, max_steps=20)
    trainer.train()
    # the first batch comes from synced weights; the second is the onset
    assert statuses(callback)[0] == "OK"
    assert statuses(callback)[-1] == "HALT"
    assert len(callback.verdicts) <= 1 + 3
    halted = callback.verdicts[-1].step
    assert trainer.state.global_step == halted
    assert (tmp_path / f"checkpoint-{halted}" / "model.safetensors").exists()
    told = capfd.readouterr().err
    assert f"HALT at step {halted}" in told
    assert "logp_abs_diff/mean" in told
    assert "action='log'" in told
    assert jsonl(tmp_path)[-1]["status"] == "HALT"
    assert trainer.state.log_history[-2]["parity/breaker/status"] == 3
    lines = [line.split("\r")[-1] for line in told.splitlines()]
    assert len([line for line in lines if line.startswith("trl-parity") and "watches GRPOTrainer" in line]) == 1
    [ended] = [line for line in lines if line.startswith(f"trl-parity: HALT, halted at step {halted}: ")]
    assert f"cause: {callback.diagnosis.cause}" in ended
    with pytest.raises(ParityHalt, match=f"halted at step {halted}"):
        callback.raise_if_halted()


def test_truncated_sampling_halts_and_is_named(make_trainer, tmp_path, caplog):
    callback = ParityCallback()
    make_trainer(tmp_path, callback, max_steps=20, top_p=0.9, learning_rate=1e-5).train()
    assert "the engine changes its distribution (top_p=0.9): the loss does not" in caplog.text
    assert statuses(callback) == ["BREACH", "BREACH", "HALT"]
    stats = callback.verdicts[-1].stats
    assert stats["honesty_high"] < 1.0
    assert stats["replayed/kl_k3"] < 0.2 * stats["kl_k3"]  # the other law is measured beside it
    assert callback.diagnosis.cause == "truncated_sampling", callback.diagnosis.summary
    assert "top_p=1.0" in callback.diagnosis.fix


@pytest.mark.parametrize("few", [(64, 1024), (2, 4)], ids=["whole-vocabulary", "few-then-more-then-rows"])
def test_truncated_sampling_is_reported_apart_when_replayed(make_trainer, tmp_path, few, monkeypatch):
    for name, n in zip(("_FEW", "_MANY"), few, strict=True):
        monkeypatch.setattr(f"trl_parity.scoring.sampling.{name}", n)
    callback = ParityCallback(truncation="replay")
    make_trainer(tmp_path, callback, max_steps=3, top_p=0.9, learning_rate=1e-5).train()
    # the two sides agree; what TRL's correction takes away of the loss, which knows no truncation, is told
    assert [(v.status, v.warnings, v.breaches) for v in callback.verdicts] == [("WARN", ("correction/lost",), ())] * 3
    stats = callback.verdicts[-1].stats
    assert stats["kl_k3"] < 1e-3
    assert 0.88 < stats["truncation/kept_mass"] < 0.99
    assert stats["own_head/logp_abs_diff/mean"] == pytest.approx(-stats["truncation/log_bias"], rel=0.2)
    assert stats["replayed/kl_k3"] == pytest.approx(stats["kl_k3"])


def test_penalties_are_replayed(make_trainer, tmp_path):
    callback = ParityCallback(truncation="replay")
    kwargs = {"presence_penalty": 0.5, "frequency_penalty": 0.3}
    make_trainer(tmp_path, callback, max_steps=2, repetition_penalty=1.2, generation_kwargs=kwargs).train()
    stats = callback.verdicts[-1].stats
    assert stats["kl_k3"] < 1e-3
    assert stats["own_head/kl_k3"] > 10 * stats["kl_k3"]


def test_an_engine_at_another_temperature_is_drift(make_trainer, tmp_path):
    callback = ParityCallback()
    make_trainer(tmp_path, callback, max_steps=20, generation_kwargs={"temperature": 1.3}, learning_rate=1e-5).train()
    assert statuses(callback) == ["BREACH", "BREACH", "HALT"]


# ---- what a halt does -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["stop", "skip_update"])
def test_a_condemned_batch_never_reaches_the_weights(make_trainer, tmp_path, action):
    """top_p makes every batch breach; windows 1 and 2 are learned from, window 3 halts: bit-equal from there on."""

    class Snapshots(TrainerCallback):
        def __init__(self):
            self.before, self.after, self.moments = [], [], []

        def on_step_begin(self, *args, model=None, **kwargs):
            self.before.append({k: v.detach().clone() for k, v in model.named_parameters()})

        def on_step_end(self, *args, model=None, optimizer=None, **kwargs):
            self.after.append({k: v.detach().clone() for k, v in model.named_parameters()})
            self.moments.append([s["exp_avg"].clone() for s in optimizer.state.values()])

    snapshots = Snapshots()
    callback = ParityCallback(truncation="ignore", action=action)
    trainer = make_trainer(
        tmp_path, callback, snapshots, max_steps=5, top_p=0.9, learning_rate=1e-4, weight_decay=0.1,
        gradient_accumulation_steps=2, steps_per_generation=2,
    )  # fmt: skip
    trainer.train()
    assert statuses(callback) == ["BREACH", "BREACH"] + ["HALT"] * (1 if action == "stop" else 3)
    assert trainer.state.global_step == (3 if action == "stop" else 5)
    for step, (before, after) in enumerate(zip(snapshots.before, snapshots.after, strict=True), start=1):
        equal = all(torch.equal(value, after[name]) for name, value in before.items())
        assert equal == (step >= 3), step
    for first, second in zip(snapshots.moments[1], snapshots.moments[-1], strict=True):
        assert torch.equal(first, second)


def test_action_raise_raises_before_the_batch_is_learned_from(make_trainer, tmp_path):
    callback = ParityCallback(truncation="ignore", action="raise", consecutive=1)
    trainer = make_trainer(tmp_path, callback, max_steps=5, top_p=0.9)
    before = parameters(trainer)
    with pytest.raises(ParityHalt, match="HALT at step 1") as raised:
        trainer.train()
    assert raised.value.verdict.breaches
    for name, value in parameters(trainer).items():
        assert torch.equal(value, before[name])


def test_action_log_only_logs(make_trainer, tmp_path):
    callback = ParityCallback(truncation="ignore", action="log")
    trainer = make_trainer(tmp_path, callback, max_steps=5, top_p=0.9, learning_rate=1e-5)
    trainer.train()
    assert trainer.state.global_step == 5
    assert statuses(callback) == ["BREACH", "BREACH", "HALT", "HALT", "HALT"]


# ---- windows, lag, evaluation, resume ---------------------------------------------------------------------------


def test_windows_of_several_steps_and_rarer_logs_aggregate_without_means_of_means(make_trainer, tmp_path):
    callback = ParityCallback(every_n_steps=2)
    trainer = make_trainer(tmp_path, callback, max_steps=7, logging_steps=4)
    trainer.train()
    lines = jsonl(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 7]  # the last window is cut short by the end
    assert [line["num_batches"] for line in lines] == [2, 2, 2, 1]
    row, last = [row for row in trainer.state.log_history if "parity/kl_k3" in row]
    tokens = [line["num_tokens"] for line in lines[:2]]
    pooled = sum(n * line["kl_k3"] for n, line in zip(tokens, lines, strict=False)) / sum(tokens)
    assert row["parity/kl_k3"] == pytest.approx(pooled, rel=1e-9)
    assert row["parity/logp_abs_diff/max"] == max(line["logp_abs_diff/max"] for line in lines[:2])
    assert last["parity/logp_abs_diff/max"] == max(line["logp_abs_diff/max"] for line in lines[2:])
    assert [(r["step"], r["parity/breaker/windows"]) for r in (row, last)] == [(4, 2), (7, 2)]


def test_reused_batches_drift_by_policy_not_by_mismatch(make_trainer, tmp_path):
    callback = ParityCallback()
    make_trainer(tmp_path, callback, max_steps=6, num_iterations=3, learning_rate=3e-4).train()
    assert [v.step for v in callback.verdicts] == [1, 4]  # one batch feeds three steps
    assert statuses(callback) == ["OK", "WARN"]
    assert callback.verdicts[-1].warnings == ("policy_drift/kl_k3",)  # its own rule, and no breach
    stats = callback.verdicts[-1].stats
    assert stats["policy_drift/kl_k3"] > 10 * stats["kl_k3"]


def test_several_generations_in_one_step_make_one_window(make_trainer, tmp_path):
    callback = ParityCallback()
    make_trainer(tmp_path, callback, max_steps=2, gradient_accumulation_steps=3, steps_per_generation=1).train()
    assert [(line["step"], line["num_batches"]) for line in jsonl(tmp_path)] == [(1, 3), (2, 3)]


def test_without_trls_pass_the_callback_scores_a_sample_under_its_budget(make_trainer, tmp_path):
    callback = Recorder(token_budget=200, floor_tokens=0)
    trainer = make_trainer(
        tmp_path, callback, max_steps=2, vllm_importance_sampling_correction=False, per_device_train_batch_size=16
    )
    calls = []
    trainer.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    line = jsonl(tmp_path)[-1]
    rows = 200 // (4 + 24)  # prompts "a+b=" are 4 tokens
    rollout, scored = callback.seen[-1]
    assert len(scored.rows) == rows
    assert line["num_tokens"] == rollout.engine_mask[scored.rows].sum()
    assert line["status"] == "OK"
    assert line["kl_k3"] < 1e-3
    assert line["own_head/kl_k3"] is not None
    assert len(calls) == 2 * 2  # the loss and the sample, once a step


def test_evaluation_is_measured_apart(make_trainer, tmp_path):
    callback = ParityCallback()
    trainer = make_trainer(
        tmp_path, callback, max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=16,
        trainer_kwargs={"eval_dataset": prompts(16)},
    )  # fmt: skip
    trainer.train()
    evaluations = [row for row in trainer.state.log_history if "eval_parity/kl_k3" in row]
    assert len(evaluations) == 2
    assert all(row["eval_parity/kl_k3"] < 1e-3 for row in evaluations)
    assert [line["num_batches"] for line in jsonl(tmp_path)] == [1, 1]

    callback = ParityCallback(eval_batches="skip")
    trainer = make_trainer(
        tmp_path / "skip", callback, max_steps=1, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=16,
        trainer_kwargs={"eval_dataset": prompts(16)},
    )  # fmt: skip
    trainer.train()
    assert not [row for row in trainer.state.log_history if "eval_parity/kl_k3" in row]


@pytest.mark.parametrize("restore_callbacks", [False, True])
def test_a_run_killed_in_a_streak_resumes_the_streak(make_trainer, tmp_path, restore_callbacks):
    settings = {
        "max_steps": 6, "top_p": 0.9, "learning_rate": 1e-5, "save_strategy": "steps", "save_steps": 1,
        "restore_callback_states_from_checkpoint": restore_callbacks,
    }  # fmt: skip
    first = ParityCallback(truncation="ignore", action="raise")
    with pytest.raises(ParityHalt):  # dies in step 3, after the checkpoint of step 2
        make_trainer(tmp_path, first, **settings).train()
    assert [line["step"] for line in jsonl(tmp_path)] == [1, 2, 3]

    second = ParityCallback(truncation="ignore", action="raise")
    with pytest.raises(ParityHalt, match="step 3"):
        make_trainer(tmp_path, second, **settings).train(resume_from_checkpoint=True)
    assert [(line["step"], line["streak"]) for line in jsonl(tmp_path)] == [(1, 1), (2, 2), (3, 3)]


class Killed(TrainerCallback):
    """The process ends right after the checkpoint of a step."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_checkpoint_in_the_middle_of_a_window_loses_none_of_it(make_trainer, tmp_path):
    settings = {"learning_rate": 1e-5, "save_strategy": "steps", "save_steps": 1}
    killed = Killed(step=2)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, ParityCallback(every_n_steps=3), killed, max_steps=6, **settings).train()
    second = ParityCallback(every_n_steps=3)
    make_trainer(tmp_path, second, max_steps=6, **settings).train(resume_from_checkpoint=True)
    lines = jsonl(tmp_path)
    assert [(line["step"], line["num_batches"], line["num_sequences"]) for line in lines] == [(3, 3, 48), (6, 3, 48)]
    assert all(line["num_tokens"] > 2.5 * 16 * 24 for line in lines)
    assert lines[0]["floor/age"] == 0
    assert statuses(second) == ["OK", "OK"]


def test_the_floor_and_the_episode_are_part_of_the_checkpoint(make_trainer, tmp_path):
    settings = {"learning_rate": 1e-5, "save_strategy": "steps", "save_steps": 1, "top_p": 0.9}
    first = ParityCallback(truncation="ignore", action="log")
    make_trainer(tmp_path, first, max_steps=2, **settings).train()
    second = ParityCallback(truncation="ignore", action="log")
    make_trainer(tmp_path, second, max_steps=3, **settings).train(resume_from_checkpoint=True)
    assert [v.alert for v in first.verdicts] == ["WARN", ""]
    assert [v.alert for v in second.verdicts] == ["HALT"]
    assert second.monitor.floor.wall > first.monitor.floor.wall  # the cost account goes on
    assert [line["streak"] for line in jsonl(tmp_path)] == [1, 2, 3]


# ---- what can't be measured -------------------------------------------------------------------------------------


def test_a_run_without_vllm_fails_at_the_first_step(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, ParityCallback(), use_vllm=False)
    with pytest.raises(InterceptionError, match="use_vllm=True"):
        trainer.train()


def test_rollouts_without_logprobs_fail_at_the_first_step(make_trainer, tmp_path):
    def rollout(prompts, trainer):
        ids = [[5, 6, 7] for _ in prompts]
        return {"prompt_ids": [[8, 9] for _ in prompts], "completion_ids": ids, "logprobs": None}

    trainer = make_trainer(
        tmp_path, ParityCallback(), vllm_importance_sampling_correction=False, trainer_kwargs={"rollout_func": rollout}
    )
    with pytest.raises(InterceptionError, match="without log-probs"):
        trainer.train()


def test_a_subclass_that_replaces_the_rollout_method_fails_before_it_learns(make_trainer, tmp_path):
    from trl import GRPOTrainer

    class Own(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return GRPOTrainer._generate_and_score_completions.__wrapped__(self, inputs)

    trainer = make_trainer(tmp_path, ParityCallback(), cls=Own)
    before = parameters(trainer)
    with pytest.raises(InterceptionError, match="no rollout batch was intercepted"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in parameters(trainer).items())


def test_a_subclass_that_calls_super_is_covered(make_trainer, tmp_path):
    from trl import GRPOTrainer

    class Own(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions(inputs)

    callback = ParityCallback()
    make_trainer(tmp_path, callback, cls=Own, max_steps=1).train()
    assert statuses(callback) == ["OK"]


def test_interception_lost_in_mid_run_is_an_error_window_not_silence(make_trainer, tmp_path):
    callback = ParityCallback()
    trainer = make_trainer(tmp_path, callback, max_steps=4)
    real = trainer._generate_and_score_completions
    calls = []

    def bypass(inputs):
        calls.append(1)
        return (
            real(inputs)
            if len(calls) <= 2
            else type(trainer)._generate_and_score_completions.__wrapped__(trainer, inputs)
        )

    trainer._generate_and_score_completions = bypass
    trainer.train()
    assert statuses(callback) == ["OK", "OK", "ERROR", "ERROR"]
    assert "no rollout batch" in callback.verdicts[-1].reason
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_nonfinite_logprobs_from_the_engine_are_counted_and_training_survives(make_trainer, tmp_path, bad):
    callback = ParityCallback()
    trainer = make_trainer(tmp_path, callback, max_steps=2)
    generate, sampled = trainer.vllm_generation.generate, []

    def spoiled(*args, **kwargs):
        prompt_ids, completion_ids, logprobs, token_ids = generate(*args, **kwargs)
        logprobs[0][3] = [bad]
        sampled.append(sum(map(len, completion_ids)))
        return prompt_ids, completion_ids, logprobs, token_ids

    trainer.vllm_generation.generate = spoiled
    trainer.train()
    assert statuses(callback) == ["OK", "OK"]  # one token of some 380 is under the rule's 1 %
    assert callback.verdicts[-1].stats["nonfinite_rate"] == pytest.approx(1 / sampled[-1])
    assert math.isfinite(callback.verdicts[-1].stats["kl_k3"])


def test_a_batch_that_the_loss_leaves_out_is_measured_all_the_same(make_trainer, tmp_path, caplog):
    callback = ParityCallback()
    # no completion may end: every one is truncated, and so masked, and comes from another law than the policy's
    never = {"logit_bias": {0: -100.0, 1: -100.0}}
    make_trainer(tmp_path, callback, max_steps=2, mask_truncated_completions=True, generation_kwargs=never).train()
    assert statuses(callback) == ["BREACH", "BREACH"]
    assert {window["num_tokens"] for window in jsonl(tmp_path)} == {16 * 24}
    assert all(window["entropy/trainer"] > 0.1 for window in jsonl(tmp_path))
    assert "the trainer's own log-probs" not in caplog.text


def test_our_own_failure_is_an_error_window_and_training_goes_on(make_trainer, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr("trl_parity.scoring.scorer.score_tokens", broken)
    callback = ParityCallback()
    trainer = make_trainer(tmp_path, callback, max_steps=4)
    trainer.train()
    assert statuses(callback) == ["ERROR"] * 4
    assert "out of memory, say" in jsonl(tmp_path)[0]["reason"]
    assert trainer.state.global_step == 4


def test_contradicting_shapes_are_an_error_window(make_trainer, tmp_path):
    callback = ParityCallback()
    trainer = make_trainer(tmp_path, callback, max_steps=1)
    measure = callback._run.batches.of

    def cut(capture):
        capture.output["sampling_per_token_logps"] = capture.output["sampling_per_token_logps"][:, :-2]
        return measure(capture)

    callback._run.batches.of = cut
    trainer.train()
    assert statuses(callback) == ["ERROR"]
    assert "Check that both come from the same rollout" in callback.verdicts[0].reason


def test_an_unwritable_output_fails_before_the_first_step(make_trainer, tmp_path):
    (tmp_path / "blocked").write_text("")
    trainer = make_trainer(tmp_path, ParityCallback(parity_dir=str(tmp_path / "blocked")))
    with pytest.raises(ConfigError, match="Expected a writable directory"):
        trainer.train()
    assert trainer.state.global_step == 0
