"""ParityCallback on real PPO (TRL 1.12): as it is, with transformers' generate, and with vLLM rollouts.

Run with ``make test-ppo``: newer TRLs have no PPOTrainer. One engine serves the whole module.
"""

import copy
import json
import subprocess
import sys

import pytest
import torch
from support import ROOT, TESTS
from support.callbacks import jsonl, statuses
from support.models import save_tiny_model
from support.ppo import ppo_trainer
from support.processes import environment
from support.trainers import digit_reward, grpo_args, prompts, shared_engine
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.experimental.ppo import PPOTrainer
from trl.experimental.ppo import ppo_trainer as loop

from trl_parity import ParityCallback, ParityHalt
from trl_parity.engine.colocated import ColocatedEngine
from trl_parity.engine.weight_readback import policy_tensors, read_back
from trl_parity.errors import ConfigError, InterceptionError
from trl_parity.ppo import use_vllm
from trl_parity.trainers.instrumentation import uninstrument

engine = pytest.mark.engine
ENGINE = {"gpu_memory_utilization": 0.1, "max_model_length": 256}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make(model_dir, tmp_path):
    """PPOTrainers as they are."""

    def make(*callbacks, **args):
        return ppo_trainer(model_dir, args.pop("output_dir", tmp_path), *callbacks, **args)

    return make


@pytest.fixture(scope="module")
def one_engine():
    with shared_engine():
        yield


@pytest.fixture
def make_vllm(make, one_engine):
    """PPOTrainers with vLLM rollouts, all from one engine; each run syncs its weights first."""

    def make_one(*callbacks, settings=None, **args):
        trainer = make(*callbacks, **args)
        use_vllm(trainer, **ENGINE, **(settings or {}))
        return trainer

    return make_one


class Recorder(ParityCallback):
    """Keeps what was intercepted."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def on_generation(self, capture):
        super().on_generation(capture)
        self.seen.append((capture, *self._run.batches.last))


class Snapshots(TrainerCallback):
    """The weights of policy and value model after each step, and whether the run was ended as runs are."""

    def __init__(self):
        self.after, self.ended, self.logged = [], 0, []

    def on_train_begin(self, *args, model=None, **kwargs):
        self.after.append(weights_of(model))

    def on_step_end(self, *args, model=None, **kwargs):
        self.after.append(weights_of(model))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, set(logs)))

    def on_train_end(self, *args, **kwargs):
        self.ended += 1


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def sick(trainer):
    """transformers lays the model's generation config under PPO's arguments: it samples with a penalty."""
    trainer.policy_model.generation_config.repetition_penalty = 1.3
    return trainer


def numbers_of_ppo(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def check_what_ppo_learns_from(callback, trainer, masks):
    """The mask is PPO's own; the log-probs under it give the entropy PPO logs, its scores are the rewards."""
    for (_, rollout, _), mask, theirs in zip(
        callback.seen, masks, numbers_of_ppo(trainer, "objective/entropy"), strict=True
    ):
        assert torch.equal(rollout.engine_mask, mask)
        learned = rollout.rollout_logprobs if rollout.own_logprobs is None else rollout.own_logprobs
        assert float(-(learned * mask).sum(1).mean()) == pytest.approx(theirs, rel=1e-5)
    assert [v.stats["reward/mean"] for v in callback.verdicts] == pytest.approx(
        numbers_of_ppo(trainer, "objective/scores"), rel=1e-5
    )


@pytest.fixture
def masks(monkeypatch):
    """Which tokens PPO learns from, as its loop computes it."""
    seen, real = [], loop.masked_whiten

    def whiten(values, mask, shift_mean=True):
        if shift_mean:  # of the advantages
            seen.append(mask.clone())
        return real(values, mask, shift_mean)

    monkeypatch.setattr(loop, "masked_whiten", whiten)
    return seen


# ---- as it is ---------------------------------------------------------------------------------------------------


def test_as_it_is_every_batch_is_measured_and_logged(make, tmp_path, masks):
    callback, snapshots = Recorder(), Snapshots()
    trainer = make(callback, snapshots, missing_eos_penalty=1.0, num_sample_generations=4, eval_size=8)
    trainer.train()
    assert [v.breaches for v in callback.verdicts] == [()] * 4
    assert [line["step"] for line in jsonl(tmp_path)] == [1, 2, 3, 4]
    assert all(line["num_batches"] == 1 and line["kl_k3"] < 1e-9 for line in jsonl(tmp_path))
    check_what_ppo_learns_from(callback, trainer, masks)
    assert not all(bool(mask.all()) for mask in masks)  # some end early
    assert [step for step, names in snapshots.logged if "parity/kl_k3" in names] == [1, 2, 3, 4]
    capture, rollout, scored = callback.seen[0]
    assert capture.generation is None
    assert rollout.lag == 0
    assert rollout.sampling.temperature == rollout.trainer_temperature == trainer.args.temperature + 1e-7
    assert len(rollout.engine_mask) == 16
    assert scored.mask.sum() == rollout.engine_mask.sum()  # rows that end at once have nothing to compare
    assert set(callback.monitor.floor.sources) == {"rounding", "batch_shape"}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_is_bit_equal_with_and_without_the_callback(make, tmp_path, dropout):
    """With dropout: every window breaches, floors and diagnoses are passes of our own in training mode."""
    after = {}
    for name in ("with", "without"):
        snapshots = Snapshots()
        watched = ParityCallback(action="log") if dropout else ParityCallback()
        trainer = make(*([watched] if name == "with" else []), snapshots, updates=3, output_dir=tmp_path / name)
        for module in trainer.policy_model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
        trainer.train()
        after[name] = snapshots.after
    assert len(after["with"]) == len(after["without"]) == 4
    assert not equal(after["with"][0], after["with"][3])
    for a, b in zip(after["with"], after["without"], strict=True):
        assert equal(a, b)


def test_after_the_run_the_loop_is_trls_own(make):
    before = loop.batch_generation, loop.get_reward
    trainer = make(ParityCallback(), updates=1)
    trainer.train()
    assert (loop.batch_generation, loop.get_reward) == before
    assert "step" not in vars(trainer.optimizer)
    assert "generate_completions" not in vars(trainer)


@pytest.mark.parametrize("action", ["stop", "skip_update", "log"])
def test_what_a_halt_does(make, tmp_path, action, capfd):
    """Windows 1 and 2 breach and are learned from, window 3 halts."""
    callback, snapshots = ParityCallback(truncation="ignore", action=action), Snapshots()
    trainer = sick(make(callback, snapshots, updates=5, learning_rate=1e-4, weight_decay=0.1))
    trainer.train()
    steps = 3 if action == "stop" else 5
    assert statuses(callback) == ["BREACH", "BREACH"] + ["HALT"] * (steps - 2)
    assert trainer.state.global_step == steps
    assert trainer.state.episode == 16 * steps
    assert snapshots.ended == 1
    assert len(jsonl(tmp_path)) == steps
    assert callback.monitor._jsonl is None  # closed
    moved = [not equal(a, b) for a, b in zip(snapshots.after, snapshots.after[1:], strict=False)]
    assert moved == ([True] * 5 if action == "log" else [True, True] + [False] * (steps - 2))
    assert "HALT at step 3" in capfd.readouterr().err
    checkpoint = tmp_path / "checkpoint-3"
    assert checkpoint.exists() == (action == "stop")
    if action == "stop":
        policy = dict(AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters())
        kept = {k.removeprefix("policy."): v for k, v in snapshots.after[2].items() if k.startswith("policy.")}
        assert equal(kept, policy)
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert state["global_step"] == 3
        assert state["stateful_callbacks"]["ParityCallback"]["attributes"]["checkpoint"]["breaker"]["streak"] == 3
        assert (checkpoint / "optimizer.pt").exists()


def test_a_trainer_that_was_stopped_trains_again(make, tmp_path):
    callback = ParityCallback(truncation="ignore", consecutive=1)
    trainer = sick(make(callback, updates=3))
    trainer.train()
    assert trainer.state.global_step == 1
    trainer.policy_model.generation_config.repetition_penalty = None
    trainer.train()
    assert trainer.state.global_step == 3
    assert [v.breaches for v in callback.verdicts] == [()] * 3


def test_action_raise_raises_before_the_batch_is_learned_from(make):
    callback, snapshots = ParityCallback(truncation="ignore", action="raise", consecutive=1), Snapshots()
    trainer = sick(make(callback, snapshots))
    with pytest.raises(ParityHalt, match="HALT at step 1"):
        trainer.train()
    assert equal(snapshots.after[0], weights_of(trainer.model))


@pytest.mark.parametrize(
    ("setting", "value", "cause"), [("repetition_penalty", 1.3, "penalties"), ("min_p", 0.2, "truncated_sampling")]
)
def test_as_it_is_a_fault_is_halted_and_named_and_what_no_engine_could_be_asked_is_said(make, setting, value, cause):
    callback = ParityCallback(truncation="ignore", diagnose_budget=1000)
    trainer = make(callback, updates=3, learning_rate=1e-5)
    config = trainer.policy_model.generation_config
    setattr(config, setting, value)
    config.do_sample = True  # else transformers refuses to save a checkpoint with such a setting
    trainer.train()
    assert statuses(callback) == ["BREACH", "BREACH", "HALT"]
    assert callback.diagnosis.cause == cause
    said = {e.name: e.error for e in callback.diagnosis.evidence}
    assert "there is no engine: the trainer samples by itself" in said["handover"]


def test_a_failed_measurement_is_an_error_window_and_training_goes_on(make, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr("trl_parity.scoring.scorer.score_tokens", broken)
    callback = ParityCallback()
    trainer = make(callback, updates=4)
    trainer.train()
    assert statuses(callback) == ["ERROR"] * 4
    assert trainer.state.global_step == 4


RANKS = """
import json, sys
from pathlib import Path
from support.ppo import ppo_trainer
from trl_parity import ParityCallback

model, out = map(Path, sys.argv[1:])
callback = ParityCallback(truncation="ignore", diagnose="never")
trainer = ppo_trainer(model, out, callback, updates=10, learning_rate=1e-4)
assert trainer.accelerator.num_processes == 2
trainer.policy_model.generation_config.repetition_penalty = 1.3
trainer.train()
rank = trainer.accelerator.process_index
(out / f"rank{rank}.json").write_text(json.dumps({
    "verdicts": [v.to_dict() for v in callback.verdicts], "step": trainer.state.global_step,
    "weights": float(sum(p.double().sum() for p in trainer.policy_model.parameters())),
}))
"""


def test_two_ranks_stop_together_with_a_checkpoint(model_dir, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    env = environment(PYTHONPATH=f"{TESTS}:{ROOT}", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(script), str(model_dir), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / "out" / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second  # to the last digit
    assert [v["status"] for v in first["verdicts"]] == ["BREACH", "BREACH", "HALT"]
    assert first["step"] == 3
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3")
    assert float(sum(p.double().sum() for p in saved.parameters())) == first["weights"]


# ---- what can't be seen -----------------------------------------------------------------------------------------


def test_a_subclass_with_a_loop_of_its_own_fails_after_one_step(make):
    trainer = make(ParityCallback())
    trainer.__class__ = type("Own", (PPOTrainer,), {"train": PPOTrainer.train.__wrapped__})
    with pytest.raises(InterceptionError, match="step 1 is over but no rollout batch was intercepted"):
        trainer.train()


def test_a_batch_that_was_not_seen_is_not_learned_from(make):
    """The loop scores with another reward model than the trainer's: nothing is taken for a batch of its."""

    class Swap(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            trainer.reward_model = copy.deepcopy(trainer.reward_model)

    snapshots = Snapshots()
    trainer = make(ParityCallback(), snapshots, Swap())
    with pytest.raises(InterceptionError, match="an optimizer step is due but no rollout batch was intercepted"):
        trainer.train()
    assert equal(snapshots.after[0], weights_of(trainer.model))


def test_a_trainer_imported_after_the_callback_is_covered_and_one_unwrapped_refuses(make):
    callback = ParityCallback()
    uninstrument()  # as before the import
    trainer = make(callback, updates=1)
    trainer.train()
    assert [v.breaches for v in callback.verdicts] == [()]
    uninstrument()
    with pytest.raises(InterceptionError, match="would run unobserved"):
        trainer.train()


# ---- with vLLM --------------------------------------------------------------------------------------------------


class Synced(Recorder):
    """Tensors of the engine that are not the policy's, at each generation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.apart, self.held = [], []

    def on_generation(self, capture):
        model = ColocatedEngine(capture.generation.llm).model
        named = [(name, tensor) for name, tensor, *_ in policy_tensors(capture.policy)]
        self.apart.append([h.name for h in read_back(model.load_weights, model, named) if h.differing])
        self.held.append(model.model.layers[0].mlp.down_proj.weight.detach().clone())
        super().on_generation(capture)


@engine
def test_with_vllm_the_engine_samples_the_policy_of_every_step(make_vllm, masks, monkeypatch):
    callback = Synced()
    trainer = make_vllm(callback, learning_rate=3e-4, missing_eos_penalty=1.0)
    llm, answers = trainer.vllm_generation.llm, []
    generate = llm.generate
    monkeypatch.setattr(llm, "generate", lambda *a, **k: answers.append(generate(*a, **k)) or answers[-1])
    trainer.train()
    answers = [a for a in answers if a[0].prompt_logprobs is None]  # the floor's are re-scores
    assert [v.breaches for v in callback.verdicts] == [()] * 4
    assert callback.apart == [[]] * 4
    for a, b in zip(callback.held, callback.held[1:], strict=False):
        assert not torch.equal(a, b)
    check_what_ppo_learns_from(callback, trainer, masks)
    ends = {trainer.processing_class.pad_token_id, trainer.stop_token_id}
    for (capture, rollout, scored), outputs in zip(callback.seen, answers, strict=True):
        assert capture.pass_logprobs is not None
        assert rollout.lag == 0
        for row, output in enumerate(o for request in outputs for o in request.outputs):
            ids = list(output.token_ids)
            assert rollout.completion_ids[row, : len(ids)].tolist() == ids
            learned = next((i + (t == trainer.stop_token_id) for i, t in enumerate(ids) if t in ends), len(ids))
            assert int(rollout.engine_mask[row].sum()) == learned
            said = [lp[t].logprob for lp, t in zip(output.logprobs, ids, strict=True)][:learned]
            torch.testing.assert_close(scored.rollout_logprobs[row, :learned], torch.tensor(said))
    assert set(callback.monitor.floor.sources) == {"rounding", "batch_shape", "engine"}


@engine
def test_with_vllm_no_backbone_forward_is_added(make_vllm, tmp_path):
    counts, after = {}, {}
    for name, callbacks in {"with": [ParityCallback(floor_tokens=0)], "without": []}.items():
        settings = {"generation_kwargs": {"seed": 7}}
        trainer = make_vllm(*callbacks, updates=2, output_dir=tmp_path / name, settings=settings)
        calls = []
        trainer.policy_model.base_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        counts[name], after[name] = len(calls), weights_of(trainer.model)
    assert counts["with"] == counts["without"] > 0
    assert equal(after["with"], after["without"])


def lose_sync(trainer, monkeypatch):
    """The first sync arrives, later ones are lost."""
    generation = trainer.vllm_generation
    real, calls = generation.sync_weights, []
    monkeypatch.setattr(generation, "sync_weights", lambda: calls.append(1) or (real() if len(calls) == 1 else None))


def raw_logprobs(trainer, monkeypatch):
    """An engine built with logprobs_mode=raw_logprobs."""
    runner = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner
    for sampler in (runner.sampler, runner.sampler.topk_topp_sampler):
        monkeypatch.setattr(sampler, "logprobs_mode", "raw_logprobs")
    config = trainer.vllm_generation.llm.llm_engine.vllm_config.model_config
    monkeypatch.setattr(config, "logprobs_mode", "raw_logprobs")


def top_p(trainer, monkeypatch):
    trainer.vllm_generation.generation_kwargs["top_p"] = 0.8


def hot(trainer, monkeypatch):
    trainer.vllm_generation.generation_kwargs["temperature"] = 1.3


@engine
@pytest.mark.parametrize(
    ("fault", "cause", "learning_rate"),
    [
        (lose_sync, "stale_weights", 1e-3),
        (raw_logprobs, "raw_logprobs", 1e-5),
        (hot, "temperature", 1e-5),
        (top_p, "truncated_sampling", 1e-5),
    ],
)
def test_a_fault_of_the_engine_is_halted_and_named(make_vllm, tmp_path, monkeypatch, fault, cause, learning_rate):
    callback = ParityCallback(truncation="ignore")
    trainer = make_vllm(callback, updates=8, learning_rate=learning_rate)
    fault(trainer, monkeypatch)
    trainer.train()
    assert statuses(callback)[-3:] == ["BREACH", "BREACH", "HALT"]
    assert set(statuses(callback)[:-3]) <= {"OK", "WARN"}
    assert len(callback.verdicts) == trainer.state.global_step <= 4
    assert callback.diagnosis.cause == cause
    incident = json.loads((callback.incident / "incident.json").read_text())
    assert incident["engine"]["mode"] == "colocate"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{trainer.state.global_step}")
    assert equal(weights_of(saved), weights_of(trainer.policy_model))


@engine
def test_settings_that_are_not_vllms_or_not_once_are_refused(make, make_vllm):
    trainer = make_vllm(updates=1)
    with pytest.raises(ConfigError, match="Call use_vllm once a trainer"):
        use_vllm(trainer, **ENGINE)
    for wrong in ({"temperature": 0.5}, {"nonsense": 1}):
        with pytest.raises(ConfigError, match=f"use_vllm got {next(iter(wrong))}. Expected arguments"):
            use_vllm(make(), **wrong)
    with pytest.raises(ConfigError, match="Expected a PPOTrainer"):
        use_vllm(object())


@engine
def test_grpo_of_this_trl_is_covered_too(model_dir, one_engine, tmp_path):
    from trl import GRPOTrainer

    callback = ParityCallback()
    trainer = GRPOTrainer(
        model=str(model_dir), args=grpo_args(tmp_path, max_steps=2), reward_funcs=digit_reward,
        train_dataset=prompts(), callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert statuses(callback) == ["OK", "OK"]
    rows = [row for row in trainer.state.log_history if "parity/kl_k3" in row]
    for row in rows:
        assert row["parity/own_head/logp_abs_diff/mean"] == pytest.approx(
            row["sampling/sampling_logp_difference/mean"], rel=1e-4
        )
