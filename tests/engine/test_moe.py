"""A mixture of experts on a CPU, whose engine wants experts in a layout of its own: real GRPO runs, one engine."""

import contextlib

import pytest
import torch
from support.models import save_tiny_moe
from support.trainers import digit_reward, grpo_args, prompts, shared_engine

from trl_parity import ParityCallback, Status

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def make_trainer(tmp_path_factory):
    from trl import GRPOTrainer
    from vllm.distributed.parallel_state import destroy_model_parallel

    destroy_model_parallel()  # of a dense engine before, which has no group of experts
    model_dir = save_tiny_moe(tmp_path_factory.mktemp("moe"))

    def make(output_dir, callback, **args):
        return GRPOTrainer(
            model=str(model_dir), args=grpo_args(output_dir, **args), reward_funcs=digit_reward,
            train_dataset=prompts(), callbacks=[callback],
        )  # fmt: skip

    with shared_engine():
        yield make


def experts(trainer):
    model = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    return [m for m in model.modules() if "w13_weight" in m._parameters]


@contextlib.contextmanager
def after_each_sync(trainer, monkeypatch, change):
    """``change`` of the first layer's experts; what a next run finds is delivered at its first sync."""
    real, layer = trainer.vllm_generation.sync_weights, experts(trainer)[0]
    with monkeypatch.context() as patched:
        patched.setattr(trainer.vllm_generation, "sync_weights", lambda: (real(), change(layer)))
        yield


def packed_for_the_kernel(layer):
    """What vLLM leaves of experts at load, and what its own forward pass does not expect here."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import cpu_prepack_moe_weight

    layer.w2_weight.data.copy_(cpu_prepack_moe_weight(layer.w2_weight.data.clone(), "vec"))


def one_expert_scaled(layer):
    layer.w13_weight.data[3].mul_(20.0)


def test_experts_follow_a_sync_and_a_clean_run_is_healthy(make_trainer, tmp_path):
    callback = ParityCallback()
    trainer = make_trainer(tmp_path, callback, max_steps=6)
    before = experts(trainer)[0].w13_weight.detach().clone()
    trainer.train()
    assert {str(v.status) for v in callback.verdicts} <= {"OK", "WARN"}  # rounding flips routers now and then
    assert len(callback.verdicts) == 6
    assert callback.diagnosis is None
    stats = callback.verdicts[-1].stats
    assert 0 < stats["floor/router_flips"] < 0.1
    for name in ("kl_k3", "logp_abs_diff/mean"):
        assert 0.1 * stats[f"floor/{name}"] < stats[f"floor/same_experts/{name}"] <= stats[f"floor/{name}"]
    assert (experts(trainer)[0].w13_weight != before).float().mean() > 0.5


@pytest.mark.parametrize(
    ("change", "part"), [(one_expert_scaled, "experts.gate_up_proj"), (packed_for_the_kernel, "experts.down_proj")]
)
def test_experts_that_are_not_as_delivered_are_halted_and_named(make_trainer, tmp_path, monkeypatch, change, part):
    callback = ParityCallback()
    trainer = make_trainer(tmp_path, callback, learning_rate=1e-4)
    with after_each_sync(trainer, monkeypatch, change):
        trainer.train()
    assert callback.status is Status.HALT
    assert len(callback.verdicts) == 3
    assert callback.diagnosis.cause == "partial_sync", callback.diagnosis.summary
    assert f"model.layers.0.mlp.{part}" in callback.diagnosis.summary
    assert callback.diagnosis.confidence > 0.9


def test_routers_that_take_other_experts_for_the_same_states_are_halted_and_named(make_trainer, tmp_path, monkeypatch):
    """Weights and all that is derived from them are the trainer's; the engine favours an expert."""
    callback = ParityCallback()
    trainer = make_trainer(tmp_path, callback)
    model = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    for gate in (layer.mlp.gate for layer in model.model.layers):

        def favouring(x, real=gate.forward):
            logits, bias = real(x)
            return logits + 0.5 * (torch.arange(logits.shape[-1]) == 3), bias

        monkeypatch.setattr(gate, "forward", favouring)
    trainer.train()
    assert callback.status is Status.HALT
    found = callback.diagnosis
    assert found.cause == "moe_routing", found.summary
    assert found.confidence > 0.9, found.summary
    assert "model.layers.0.mlp.experts others for" in found.summary
    [routing] = [e.details["routing"] for e in found.evidence if "routing" in e.details]
    assert len(routing) == 2
    assert all(0.3 < others < 0.95 and others + reweighed <= 1 for others, reweighed in routing.values())


def test_a_replaced_router_of_the_trainer_is_named_for_what_it_is(make_trainer, tmp_path):
    """Configs, weights and all that is built from them agree: what the live model is given is another choice."""
    callback = ParityCallback()
    trainer = make_trainer(tmp_path, callback)
    for layer in trainer.model.model.layers:

        def other(hidden, real=layer.mlp.gate.forward):
            logits, weights, experts = real(hidden)
            return logits, weights, (experts + 1) % 8

        layer.mlp.gate.forward = other
    trainer.train()
    found = callback.diagnosis
    assert (callback.status, found.cause) == (Status.HALT, "moe_routing"), found.summary
    assert "model.layers.0.mlp.experts, model.layers.1.mlp.experts are given is not what its routers choose" in (
        found.summary
    )
    assert found.explained > 0.9
