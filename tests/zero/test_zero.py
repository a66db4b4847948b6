"""Whole GRPO runs under DeepSpeed ZeRO on two gloo ranks, each with its own vLLM engine: `make test-deepspeed`."""

import json

import pytest
from support.models import save_tiny_model
from support.processes import run_on_two_ranks

RUN = """
import json, sys
from pathlib import Path
import deepspeed.ops
import torch
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # to be compiled on the spot; gloo does without
from transformers import TrainerCallback
from support.callbacks import statuses
from support.trainers import digit_reward, grpo_args, prompts
from trl import GRPOTrainer
from trl_parity import ParityCallback

model, out, settings, bad = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])


class Fault(TrainerCallback):
    \"\"\"In the steps named the engine samples hotter than the loss thinks. Weights and moments are kept by step.\"\"\"

    def __init__(self):
        self.kept = []

    def on_step_begin(self, args, state, control, **kwargs):
        trainer.vllm_generation.temperature = 1.0 if state.global_step + 1 in bad else trainer.temperature

    def on_step_end(self, args, state, control, **kwargs):
        inner = trainer.accelerator.deepspeed_engine_wrapped.engine.optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        moments = [t for p, moved in inner.state.items() for t in (p, *moved.values())]
        weights = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters()]
        self.kept.append([torch.as_tensor(t).detach().clone() for t in weights + moments])

    def changed(self):
        pairs = zip(self.kept, self.kept[1:])
        return [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairs]


callback, fault = ParityCallback(**settings["parity"]), Fault()
args = grpo_args(out, use_cpu=False, bf16=False, ddp_backend="gloo", per_device_train_batch_size=8, max_steps=9,
                 **settings["trainer"])
trainer = GRPOTrainer(model=model, args=args, reward_funcs=digit_reward, train_dataset=prompts(),
                      callbacks=[callback, fault])
assert trainer.accelerator.num_processes == 2
assert trainer.accelerator.distributed_type == "DEEPSPEED"
trainer.train()
assert trainer.accelerator.deepspeed_plugin.zero_stage == settings["stage"]
cause = None if callback.diagnosis is None else callback.diagnosis.cause
facts = {"statuses": statuses(callback), "changed": fault.changed(), "steps": trainer.state.global_step,
         "cause": cause, "skipped": callback._run.skipped, "moments": len(fault.kept[-1])}
(out / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(facts))
"""


def run(tmp_path, stage, bad, trainer=None, zero=None, **parity):
    """What both ranks say of nine steps, ``bad`` of them sampled at another temperature."""
    pytest.importorskip("deepspeed", reason="make test-deepspeed has it")
    out, config = tmp_path / "out", tmp_path / "deepspeed.json"
    out.mkdir()
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} | (zero or {})
    config.write_text(
        json.dumps(dict.fromkeys(auto, "auto") | {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False})
    )
    settings = {"stage": stage, "parity": parity, "trainer": trainer or {}}
    run_on_two_ranks(
        RUN, tmp_path, save_tiny_model(tmp_path / "model"), out, json.dumps(settings), json.dumps(bad),
        ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(config), ACCELERATE_TORCH_DEVICE="cpu",
    )  # fmt: skip
    first, second = (json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["moments"] > 0
    return first


@pytest.mark.engine
@pytest.mark.parametrize("stage", [2, 3])
def test_by_default_a_run_is_clean_until_a_fault_and_stops_with_the_weights_from_before_its_halt(tmp_path, stage):
    told = run(tmp_path, stage, [6, 7, 8, 9])
    assert told["statuses"] == ["OK"] * 5 + ["BREACH", "BREACH", "HALT"]
    assert told["changed"] == [True] * 6 + [False]  # from each step to the next: all but the condemned one
    assert (told["steps"], told["skipped"], told["cause"]) == (8, 1, "temperature")


@pytest.mark.engine
@pytest.mark.parametrize("stage", [2, 3])
def test_skipped_updates_move_neither_weights_nor_moments_and_the_run_heals(tmp_path, stage):
    """Over two micro-batches a step, clipped, the optimizer offloaded."""
    told = run(
        tmp_path, stage, [3, 4, 5], {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"offload_optimizer": {"device": "cpu"}}, action="skip_update", consecutive=1,
    )  # fmt: skip
    assert told["statuses"] == ["OK"] * 2 + ["HALT"] * 3 + ["OK"] * 4
    assert told["changed"] == [True, False, False, False, True, True, True, True]
    assert (told["steps"], told["skipped"], told["cause"]) == (9, 3, "temperature")
