"""Prompts with pictures: real GRPO and RLOO runs of two families, each on a real engine of its own."""

import pytest
from support.callbacks import Recorder, lose_sync, statuses
from support.pictures import FAMILIES, digits_said, picture_prompts, without_torchvision
from support.trainers import grpo_args, shared_engine

from trl_parity.trainers.pictures import encode_pictures_anew, expand_pictures_once

pytestmark = pytest.mark.engine

one_family = pytest.mark.parametrize("make_trainer", ["qwen2_5_vl"], indirect=True)


@pytest.fixture(scope="module", params=FAMILIES)
def make_trainer(request, tmp_path_factory):
    """Trainers that share one engine; each run syncs its weights first."""
    import trl

    def make(output_dir, *callbacks, kind="GRPO", pictures=True, prompts=64, once=True, anew=True, **args):
        trainer = getattr(trl, f"{kind}Trainer")(
            model=str(directory), args=grpo_args(output_dir, config=f"{kind}Config", **args),
            reward_funcs=digits_said, train_dataset=picture_prompts(pictures, prompts), callbacks=list(callbacks),
        )  # fmt: skip
        trainer.vllm_generation.llm.llm_engine.reset_encoder_cache()  # an earlier run's
        if once:
            expand_pictures_once(trainer)
        if anew:
            encode_pictures_anew(trainer)
        return trainer

    with without_torchvision(), shared_engine(limit_mm_per_prompt={"image": 1, "video": 0}):
        directory = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
        yield make


def hotter(trainer, monkeypatch):
    llm = trainer.vllm_generation.llm
    real = llm.generate

    def generate(prompts, sampling_params=None, **kwargs):
        if not isinstance(sampling_params, list) and sampling_params.max_tokens > 1:  # the run's
            sampling_params.temperature = 1.2
        return real(prompts, sampling_params=sampling_params, **kwargs)

    monkeypatch.setattr(llm, "generate", generate)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_clean_run_is_ok_with_the_engine_asked_on_its_pictures(make_trainer, tmp_path, kind):
    callback = Recorder()
    rate = {"learning_rate": 1e-4} if kind == "RLOO" else {}
    trainer = make_trainer(tmp_path, callback, kind=kind, **rate)
    trainer.train()
    assert statuses(callback) == ["OK"] * 4
    assert max(v.stats["kl_k3"] for v in callback.verdicts) < 2e-3
    assert set(callback.monitor.floor.sources) == {"rounding", "batch_shape", "engine"}
    rollout, scored = callback.seen[-1]
    assert len(rollout.image_keys.unique()) == len(scored.prompts.unique()) == 2


@pytest.mark.parametrize("cause", ["stale_weights", "temperature"])
def test_a_fault_is_halted_and_named(make_trainer, tmp_path, monkeypatch, cause):
    callback = Recorder()
    if cause == "stale_weights":
        lose_sync(monkeypatch)
    trainer = make_trainer(tmp_path, callback, max_steps=10, learning_rate=3e-3)
    if cause == "temperature":
        hotter(trainer, monkeypatch)
    trainer.train()
    assert statuses(callback)[-1] == "HALT"
    assert len(callback.verdicts) <= 6
    assert callback.diagnosis.cause == cause, callback.diagnosis.summary
    assert callback.diagnosis.explained > 0.8
    failed = [e for e in callback.diagnosis.evidence if e.error and not e.error.startswith("not possible")]
    assert not failed


@one_family
def test_text_alone_is_measured_and_a_lost_sync_named_on_such_a_model(make_trainer, tmp_path, monkeypatch):
    callback = Recorder()
    lose_sync(monkeypatch, after=3)
    trainer = make_trainer(tmp_path, callback, pictures=False, max_steps=10, learning_rate=5e-3)
    trainer.train()
    assert statuses(callback)[:3] == ["OK"] * 3
    assert statuses(callback)[-1] == "HALT"
    assert callback.diagnosis.cause == "stale_weights", callback.diagnosis.summary


@one_family
def test_tokens_of_pictures_put_in_twice_are_halted_and_named(make_trainer, tmp_path):
    callback = Recorder()
    trainer = make_trainer(tmp_path, callback, once=False)  # as TRL 1.16 hands prompts over
    trainer.train()
    assert statuses(callback)[-1] == "HALT"
    assert callback.diagnosis.cause == "token_misalignment", callback.diagnosis.summary
    assert "expand_pictures_once" in callback.diagnosis.fix


@one_family
def test_pictures_that_come_again_after_an_update_are_encoded_anew_or_halted_and_named(make_trainer, tmp_path):
    for anew in True, False:
        callback = Recorder()
        make_trainer(tmp_path / str(anew), callback, prompts=2, anew=anew, max_steps=6).train()
        assert (statuses(callback) == ["OK"] * 6) == anew
    assert statuses(callback)[-1] == "HALT"
    assert callback.diagnosis.cause == "stale_encoder_cache", callback.diagnosis.summary
    assert "encode_pictures_anew" in callback.diagnosis.fix
