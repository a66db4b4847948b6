"""RLOO, tools, environments, rollout functions, PEFT and the options of GRPO: real runs on one real engine."""

import copy
import itertools

import pytest
import torch
from support.callbacks import Recorder, lose_sync, statuses
from support.distillers import KINDS, distiller
from support.models import save_tiny_model, save_tool_tokenizer
from support.trainers import digit_reward, grpo_args, prompts, shared_engine

from trl_parity import ParityCallback, Status
from trl_parity.errors import InterceptionError

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    return save_tiny_model(directory, tokenizer=save_tool_tokenizer(directory))


@pytest.fixture(scope="module")
def make_trainer(model_dir):
    """Trainers of any class that share one engine; each run syncs its weights first."""
    from trl import GRPOTrainer, RLOOTrainer

    def make(kind, output_dir, *callbacks, trainer_kwargs=None, **args):
        cls, config = (RLOOTrainer, "RLOOConfig") if kind == "rloo" else (GRPOTrainer, "GRPOConfig")
        data = {"reward_funcs": digit_reward, "train_dataset": prompts(), "model": str(model_dir)}
        if kind == "rloo":  # advantages times whole sequences' ratios: the same rate moves it further
            args = {"learning_rate": 1e-4} | args
        settings = grpo_args(output_dir, config=config, **args)
        return cls(args=settings, callbacks=list(callbacks), **(data | (trainer_kwargs or {})))

    with shared_engine(block_size=32):
        yield make


def generated_by(trainer, monkeypatch):
    """Every completion the engine makes for the run from now on, as (ids, log-probs)."""
    llm, found = trainer.vllm_generation.llm, []
    generate = llm.generate

    def kept(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        params = kwargs["sampling_params"]
        if not isinstance(params, list) and params.logprobs is not None and params.max_tokens > 1:
            for one in (one for output in outputs for one in output.outputs):
                found.append((list(one.token_ids), [next(iter(at.values())).logprob for at in one.logprobs]))
        return outputs

    monkeypatch.setattr(llm, "generate", kept)
    return found


# ---- the faults: each one honest patch of the real stack ----------------------------------------------------------


def lost_sync(trainer, monkeypatch):
    lose_sync(monkeypatch)


def hidden(**settings):
    def patch(trainer, monkeypatch):
        llm = trainer.vllm_generation.llm
        real = llm.generate

        def generate(prompts, sampling_params=None, **kwargs):
            for params in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
                for name, value in settings.items():
                    setattr(params, name, value)
            return real(prompts, sampling_params=sampling_params, **kwargs)

        monkeypatch.setattr(llm, "generate", generate)

    return patch


FAULTS = {
    "stale_weights": (lost_sync, {"learning_rate": 5e-3}),
    "temperature": (hidden(temperature=1.2), {}),
    "truncated_sampling": (hidden(top_p=0.7), {}),
}


# ---- RLOO ---------------------------------------------------------------------------------------------------------


def test_rloo_asks_for_the_log_probs_it_drops_and_is_measured_on_every_batch(make_trainer, tmp_path, monkeypatch):
    callback = Recorder()
    trainer = make_trainer("rloo", tmp_path, callback, num_iterations=2, max_steps=6, epsilon=0.2)
    assert trainer.vllm_generation.logprobs is None  # as TRL leaves it
    generated = generated_by(trainer, monkeypatch)
    trainer.train()
    assert len(callback.verdicts) >= 3
    assert set(statuses(callback)) == {"OK"}
    rollouts = [rollout for rollout, _ in callback.seen]
    assert len(generated) == sum(len(rollout.completion_ids) for rollout in rollouts)
    rows = (
        (rollout.completion_ids[i][mask].tolist(), rollout.rollout_logprobs[i][mask])
        for rollout in rollouts
        for i, mask in enumerate(rollout.engine_mask)
    )
    for (ids, logprobs), (expected, reported) in zip(rows, generated, strict=True):
        assert ids == expected
        torch.testing.assert_close(logprobs, torch.tensor(reported))
    assert any((v.stats["policy_drift/kl_k3"] or 0) > 0 for v in callback.verdicts)  # the second iteration's


def test_rloo_is_bit_equal_with_and_without_and_no_forward_is_added(make_trainer, tmp_path):
    weights, forwards = {}, {}
    for name in ("with", "without"):
        callbacks = [ParityCallback(floor_tokens=0)] if name == "with" else []
        trainer = make_trainer("rloo", tmp_path / name, *callbacks, beta=0.05, max_steps=3)
        calls = []
        trainer.model.base_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        weights[name] = [p.detach().clone() for p in trainer.model.parameters()]
        forwards[name] = len(calls)
    assert forwards["with"] == forwards["without"] > 0
    for a, b in zip(weights["with"], weights["without"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cause", FAULTS)
@pytest.mark.parametrize("kind", ["rloo", "peft", "tools"])
def test_faults_are_halted_and_named_whatever_the_trainer(make_trainer, tmp_path, monkeypatch, kind, cause):
    patch, arguments = FAULTS[cause]
    callback = ParityCallback()
    extra = {"peft": {"peft_config": lora()}, "tools": TOOLS}.get(kind, {})
    arguments = arguments | (TOOL_ARGS if kind == "tools" else {})
    if kind == "peft" and cause == "stale_weights":
        arguments["learning_rate"] = 5e-2  # adapters start from nothing
    trainer = make_trainer(kind, tmp_path, callback, trainer_kwargs=extra, max_steps=12, **arguments)
    patch(trainer, monkeypatch)
    trainer.train()
    assert statuses(callback)[-1] == "HALT", statuses(callback)
    assert callback.diagnosis.cause == cause, callback.halt_message


# ---- learning from a teacher --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_trainers_that_learn_from_a_teacher_are_measured_on_every_batch(
    make_trainer, model_dir, tmp_path, monkeypatch, kind
):
    callback = Recorder()
    trainer = distiller(kind, model_dir, tmp_path, callback)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    assert trainer.vllm_generation.logprobs is None or kind == "iw_opd"  # as TRL leaves it
    generated = generated_by(trainer, monkeypatch)
    trainer.train()
    assert statuses(callback) == ["OK"] * 4
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert all(v.stats["entropy/trainer"] is not None for v in callback.verdicts)  # own and fp32 head are one law
    rows = (
        (ids[mask].tolist(), logprobs[mask])
        for rollout, _ in callback.seen
        for ids, mask, logprobs in zip(
            rollout.completion_ids, rollout.engine_mask, rollout.rollout_logprobs, strict=True
        )
    )
    for (ids, logprobs), (expected, reported) in zip(rows, generated, strict=True):
        assert ids == expected
        torch.testing.assert_close(logprobs, torch.tensor(reported))


@pytest.mark.parametrize("cause", ["stale_weights", "temperature"])
@pytest.mark.parametrize("kind", KINDS)
def test_faults_under_a_teacher_are_halted_and_named(make_trainer, model_dir, tmp_path, monkeypatch, kind, cause):
    patch, _ = FAULTS[cause]
    callback = ParityCallback()
    trainer = distiller(kind, model_dir, tmp_path, callback, max_steps=8)
    patch(trainer, monkeypatch)
    trainer.train()
    assert statuses(callback)[-1] == "HALT", statuses(callback)
    assert callback.diagnosis.cause == cause, callback.halt_message


@pytest.mark.parametrize("settings", [{"vllm_sync_frequency": 2}, {"lmbda": 0.0}])
def test_batches_of_older_weights_or_of_the_data_are_no_mismatch(make_trainer, model_dir, tmp_path, settings):
    callback = ParityCallback()
    distiller("gold", model_dir, tmp_path, callback, **settings).train()
    assert statuses(callback) == (["NO_DATA"] * 4 if "lmbda" in settings else ["OK", "NO_DATA"] * 2)


def test_a_trainer_that_cannot_be_measured_is_refused_before_its_engine_is_built(make_trainer, model_dir, tmp_path):
    from transformers import AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    args = OnlineDPOConfig(str(tmp_path), use_cpu=True, use_vllm=True, vllm_mode="colocate", report_to="none")
    with pytest.raises(InterceptionError, match=r"with OnlineDPOConfig .*Expected one of TRL's GRPOTrainer, "):
        OnlineDPOTrainer(
            model=str(model_dir),
            args=args,
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            reward_funcs=digit_reward,
            train_dataset=prompts(),
            callbacks=[ParityCallback()],
        )


# ---- tools, environments, rollout functions -----------------------------------------------------------------------


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: One number.
        b: The other.
    """
    return a + b


class Counter:
    """An environment with one tool."""

    def reset(self, **kwargs):
        self.total = 0
        return "count"

    def add(self, a: int, b: int) -> int:
        """Adds.

        Args:
            a: One number.
            b: The other.
        """
        self.total += a + b
        return self.total

    def get_reward(self) -> float:
        return float(self.total > 0)


def chats():
    from datasets import Dataset

    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i % 10}+{i // 10}="}]} for i in range(64)])


def chat_reward(completions, **kwargs):
    return [sum(len(message.get("content") or "") for message in c) / 50 for c in completions]


TOOL_TOKENS = range(46, 54)  # each spells a whole call of add(); the engine stops at it
TOOLS = {"tools": [add], "reward_funcs": chat_reward, "train_dataset": chats()}
TOOL_ARGS = {"generation_kwargs": {"stop_token_ids": list(TOOL_TOKENS)}, "max_completion_length": 80}


@pytest.mark.parametrize("source", ["tools", "environment"])
def test_only_tokens_the_engine_generated_are_compared(make_trainer, tmp_path, monkeypatch, source):
    callback = Recorder()
    extra = (
        TOOLS
        if source == "tools"
        else {"environment_factory": Counter} | {name: TOOLS[name] for name in ("reward_funcs", "train_dataset")}
    )
    trainer = make_trainer("tools", tmp_path, callback, trainer_kwargs=extra, max_steps=3, **TOOL_ARGS)
    generated = generated_by(trainer, monkeypatch)
    trainer.train()
    assert statuses(callback) == ["OK"] * 3
    rollouts = [rollout for rollout, _ in callback.seen]
    calls = sum(int(torch.isin(rollout.completion_ids, torch.tensor(TOOL_TOKENS)).sum()) for rollout in rollouts)
    assert calls > 5  # real calls, by TRL's loop
    results = sum(int((rollout.completion_mask.bool() & ~rollout.engine_mask).sum()) for rollout in rollouts)
    assert results > 5 * calls / 2  # what the tools said is in the sequences, and not compared
    by_first = {}
    for ids, logprobs in generated:
        by_first.setdefault(tuple(ids), []).append(logprobs)
    compared = 0
    for rollout in rollouts:
        for ids, mask, logprobs in zip(
            rollout.completion_ids, rollout.engine_mask, rollout.rollout_logprobs, strict=True
        ):
            for turn in turns(mask):
                # a last turn may be cut to max_completion_length; a whole one is exactly what the engine said
                found = by_first.get(tuple(ids[turn].tolist()))
                if found is not None:
                    compared += 1
                    assert any(torch.allclose(logprobs[turn], torch.tensor(one)) for one in found)
    assert compared >= 0.8 * len(generated)


def turns(mask):
    """Slices of the runs of True."""
    at = [*mask.nonzero().squeeze(-1).tolist(), -1]
    start = None
    for one, following in itertools.pairwise(at):
        start = one if start is None else start
        if following != one + 1:
            yield slice(start, one + 1)
            start = None


def two_turns(prompts, trainer):
    """A rollout function: the environment says '= ' between two turns of the policy."""
    tokenizer, generation = trainer.processing_class, trainer.vllm_generation
    ids = [tokenizer.encode(p) for p in prompts]
    said = tokenizer.encode("= ")
    if trainer.state.global_step != trainer._last_loaded_step:
        generation.sync_weights()
        trainer._last_loaded_step = trainer.state.global_step
    _, first, first_logprobs, _ = generation.generate(ids, None, 1)
    longer = [a + b + said for a, b in zip(ids, first, strict=True)]
    _, second, second_logprobs, _ = generation.generate(longer, None, 1)
    rows = list(zip(first, second, first_logprobs, second_logprobs, strict=True))
    return {
        "prompt_ids": ids,
        "completion_ids": [a + said + b for a, b, _, _ in rows],
        "logprobs": [[x[0] for x in p] + [0.0] * len(said) + [x[0] for x in q] for _, _, p, q in rows],
        "env_mask": [[1] * len(a) + [0] * len(said) + [1] * len(b) for a, b, _, _ in rows],
    }


def test_a_rollout_function_with_an_environment_mask(make_trainer, tmp_path):
    callback = Recorder()
    trainer = make_trainer("grpo", tmp_path, callback, trainer_kwargs={"rollout_func": two_turns}, max_steps=3)
    trainer.train()
    assert statuses(callback) == ["OK"] * 3
    for rollout, scored in callback.seen:
        outside = rollout.completion_mask.bool() & ~rollout.engine_mask
        assert (outside.sum(-1) == 2).all()
        assert torch.equal(scored.mask, rollout.engine_mask)


def test_penalties_are_replayed_turn_by_turn_as_the_engine_applies_them(make_trainer, tmp_path):
    """To the engine, the first turn and the environment are prompt of the second."""
    callback = Recorder(truncation="replay", floor_tokens=0)
    trainer = make_trainer(
        "grpo", tmp_path, callback, trainer_kwargs={"rollout_func": two_turns}, max_steps=1, bf16=False,
        generation_kwargs={"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    )  # fmt: skip
    trainer.train()
    [(_, scored)] = callback.seen
    for side, least, most in ((scored.trainer_logprobs, 0.0, 0.05), (scored.own_logprobs, 0.2, torch.inf)):
        assert least <= float((side - scored.rollout_logprobs)[scored.mask].abs().mean()) < most  # bf16 in the engine


def second_turn(out):
    """(row, index of its first token) for each row."""
    return [(i, max(j for j, one in enumerate(mask) if not one) + 1) for i, mask in enumerate(out["env_mask"])]


def rendered_anew(prompts, trainer):
    """The second turn's ids are not those that were sampled."""
    out = copy.deepcopy(two_turns(prompts, trainer))
    for row, start in second_turn(out):
        ids = out["completion_ids"][row]
        ids[start:] = [ids[start], *ids[start:-1]]
    return out


def said_otherwise(prompts, trainer):
    """The trainer's record of what the environment said is not what the engine was given."""
    out = copy.deepcopy(two_turns(prompts, trainer))
    for row, start in second_turn(out):
        out["completion_ids"][row][start - 2 : start] = trainer.processing_class.encode("zz")
    return out


@pytest.mark.parametrize("rollout_func", [rendered_anew, said_otherwise])
def test_a_later_turn_out_of_step_with_the_engine_is_halted_and_named(make_trainer, tmp_path, rollout_func):
    callback = ParityCallback()
    extra = {"rollout_func": rollout_func}
    trainer = make_trainer("grpo", tmp_path, callback, trainer_kwargs=extra, learning_rate=1e-5)
    trainer.train()
    assert statuses(callback)[-1] == "HALT", [v.reason for v in callback.verdicts]
    diagnosis = callback.diagnosis
    assert diagnosis.cause == "token_misalignment", callback.halt_message
    assert "turn 2" in callback.halt_message
    first, second = diagnosis.details["by_turn"]
    assert second["residual"] > 5 * first["residual"]


# ---- PEFT and options ---------------------------------------------------------------------------------------------


def lora(**settings):
    from peft import LoraConfig

    return LoraConfig(
        **{"r": 8, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": True} | settings
    )


def test_lora_adapters_are_part_of_the_policy_and_are_synced(make_trainer, tmp_path):
    callback = Recorder()
    extra = {"peft_config": lora()}
    trainer = make_trainer(
        "grpo", tmp_path, callback, trainer_kwargs=extra, learning_rate=2e-2, beta=0.05, max_steps=5
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_B" in n}
    trainer.train()
    assert statuses(callback) == ["OK"] * 5
    stats = callback.verdicts[-1].stats
    assert 0 <= stats["reference/base_moved"] < 1e-5  # float32: rounding
    assert stats["reference/merged"] == 0.0
    assert abs(callback.verdicts[0].stats["reference/start_kl_k3"]) < 1e-6
    moved = [float((p - before[n]).abs().max()) for n, p in trainer.model.named_parameters() if n in before]
    assert min(moved) > 1e-3
    # the last batch was generated by a policy that the base model is far from
    with trainer.model.disable_adapter():
        rollout = callback.seen[-1][0]
        ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)
        mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)
        keep = rollout.completion_ids.shape[1]
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1].float() / 0.7
    base = logits.log_softmax(-1).gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
    assert float((base - rollout.rollout_logprobs)[rollout.engine_mask].abs().mean()) > 0.05


def test_a_reference_that_is_not_the_first_policy_and_stopped_answers_that_are_masked_warn(make_trainer, tmp_path):
    callback = ParityCallback()
    callback.diagnose()
    arguments = {"mask_truncated_completions": True, "generation_kwargs": {"stop": list("0123456789")}}
    extra = {"peft_config": lora(init_lora_weights="pissa")}
    trainer = make_trainer("grpo", tmp_path, callback, trainer_kwargs=extra, beta=0.05, max_steps=1, **arguments)
    trainer.train()
    verdict = callback.verdicts[-1]
    assert {"reference/start_kl_k3", "completions/stopped_but_masked"} <= set(verdict.warnings), dict(verdict.stats)
    found = callback.diagnosis
    assert [cause.cause for cause in found.causes] == ["truncation_accounting", "reference_drift"], found.summary
    assert "trainer.eos_token_ids += [...]" in found.fix
    assert "init_lora_weights=True" in found.causes[1].fix


def test_adapters_left_out_of_the_sync_are_halted_and_named(make_trainer, tmp_path, monkeypatch):
    callback = ParityCallback()
    trainer = make_trainer(
        "grpo", tmp_path, callback, trainer_kwargs={"peft_config": lora()}, learning_rate=5e-2, max_steps=12
    )
    tuner = type(trainer.model.base_model)
    monkeypatch.setattr(tuner, "merge_adapter", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(tuner, "unmerge_adapter", lambda self, *args, **kwargs: None)
    trainer.train()
    assert statuses(callback)[-1] == "HALT"
    assert callback.diagnosis.cause == "stale_weights", callback.halt_message


OPTIONS = {
    "fp32 head": {"cast_lm_head_to_fp32": True},
    "iterations": {"num_iterations": 2, "max_steps": 6, "learning_rate": 1e-4},
    "steps per generation": {
        "steps_per_generation": 3, "per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 1e-4
    },
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "steps_per_generation": 1},
    "reference": {"beta": 0.1},
    "masked truncated": {"mask_truncated_completions": True, "max_completion_length": 100},
    "off-policy": {
        "num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 8, "max_steps": 8,
        "learning_rate": 1e-4,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_change_what_is_learned_from_when(make_trainer, tmp_path, option, kind):
    arguments = dict(OPTIONS[option])
    if kind == "rloo" and option == "fp32 head":
        with pytest.raises(TypeError):  # no such option there
            make_trainer(kind, tmp_path, **arguments)
        return
    callback = Recorder()
    trainer = make_trainer(kind, tmp_path, callback, **arguments)
    trainer.train()
    found = statuses(callback)
    assert found
    assert set(found) == {"OK"}, found
    stats = [v.stats for v in callback.verdicts if v.status is Status.OK]
    assert all(s["lag"] == 0 for s in stats)  # own updates are policy drift, never lag or mismatch
    if option in ("iterations", "off-policy", "steps per generation"):
        drift = max(s["policy_drift/kl_k3"] or 0.0 for s in stats)
        assert drift > 20 * max(s["kl_k3"] for s in stats)
    if option == "masked truncated":
        cut = sum(int((rollout.loss_mask.sum(-1) == 0).sum()) for rollout, _ in callback.seen)
        whole = sum(int((rollout.loss_mask.sum(-1) > 0).sum()) for rollout, _ in callback.seen)
        assert cut > 0
        assert whole > 0
        for rollout, scored in callback.seen:  # what was sampled is compared, whether it is learned from or not
            for ids, lost, sampled in zip(rollout.completion_ids, rollout.loss_mask, rollout.engine_mask, strict=True):
                if not lost.any():  # it ends in a token that is no padding
                    assert sampled.sum() == ids.nonzero().max() + 1
            rows = slice(None) if scored.rows is None else scored.rows
            assert torch.equal(scored.mask, rollout.engine_mask[rows])
            assert scored.own_logprobs[scored.mask].max() < 0
    if option == "fp32 head":  # then both heads are one
        assert all(s["own_head/kl_k3"] == pytest.approx(s["kl_k3"], rel=1e-3, abs=1e-9) for s in stats)


# ---- what the run has ---------------------------------------------------------------------------------------------


def own_pass(divide):
    """A library's own way to log-probs, which calls the model for whole logits."""

    def log_probs(self, model, input_ids, attention_mask, logits_to_keep, *args, batch_size=None, **kwargs):
        parts = []
        for ids, mask in zip(*(x.split(batch_size or len(x)) for x in (input_ids, attention_mask)), strict=True):
            with self.accelerator.autocast():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            law = (logits[:, -logits_to_keep - 1 : -1].float() / divide(self)).log_softmax(-1)
            parts.append(law.gather(-1, ids[:, -logits_to_keep:, None]).squeeze(-1))
        out = torch.cat(parts)
        return out, torch.zeros_like(out), None

    return log_probs


@pytest.mark.parametrize("fault", [True, False])
@pytest.mark.parametrize("how", ["a subclass", "a patch after ours"])
def test_what_is_judged_is_what_the_run_learns_with(make_trainer, tmp_path, monkeypatch, caplog, how, fault):
    """Whoever computes old_per_token_logps, and with a fault of his own: no temperature."""
    callback = Recorder(diagnose="never")
    trainer = make_trainer("grpo", tmp_path, callback, max_steps=3, learning_rate=1e-5)
    theirs = own_pass((lambda self: 1.0) if fault else (lambda self: self.temperature))
    target = type(trainer)
    if how == "a subclass":
        target = trainer.__class__ = type("Mine", (target,), {})
    monkeypatch.setattr(target, "_get_per_token_logps_and_entropies", theirs, raising=False)
    trainer.train()
    assert statuses(callback) == (["BREACH", "BREACH", "HALT"] if fault else ["OK"] * 3)
    theirs = [row["sampling/sampling_logp_difference/mean"] for row in trainer.state.log_history if "loss" in row]
    for verdict, theirs_mean in zip(callback.verdicts, theirs, strict=False):
        assert verdict.stats["own_head/logp_abs_diff/mean"] == pytest.approx(theirs_mean, rel=1e-3)
        assert (verdict.stats["entropy/trainer"] is None) == fault
    assert caplog.text.count("nats a token from what its head makes of the hidden states") == int(fault)


@pytest.mark.parametrize("name", ["_last_loaded_step", "_logs"])
def test_an_attribute_that_moved_is_named_before_anything_is_learned(make_trainer, tmp_path, name):
    trainer = make_trainer("grpo", tmp_path, ParityCallback())
    before = [p.detach().clone() for p in trainer.model.parameters()]
    delattr(trainer, name)
    with pytest.raises(InterceptionError, match=f"GRPOTrainer .* has no '{name}'"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
