"""A GRPO run on two gloo ranks, the trainer's weights or the engine's in shards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from support.models import save_tiny_model
from support.processes import run_on_two_ranks

RUN = "import sys\nfrom support.sharded_runs import run_here\nrun_here(*sys.argv[1:])"


def run(tmp_path: Path, bad: list[int], env: dict[str, str], *, lora: bool = False, parity: Any, trainer: Any) -> Any:
    """What both ranks say alike of nine steps, ``bad`` of them sampled at another temperature. ``env``: who shards.

    ``changed``: from each step to the next, whether a trained weight or a moment differs. (What is frozen moves by
    rounding as adapters are merged for a sync and taken out again.)
    """
    out = tmp_path / "out"
    out.mkdir()
    model, settings = save_tiny_model(tmp_path / "model"), {"parity": parity, "trainer": trainer, "lora": lora}
    env = ({"ACCELERATE_TORCH_DEVICE": "cpu"} | env) if env else {"ACCELERATE_USE_CPU": "true"}
    run_on_two_ranks(RUN, tmp_path, model, out, json.dumps(settings), json.dumps(bad), **env)
    first, second = (json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["moments"] > 0
    return first


def run_here(model: str, out: str, settings: str, bad: str) -> None:
    """On one rank."""
    if "ACCELERATE_USE_FSDP" in os.environ:
        shard_on_cpus()
    elif "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # to be compiled on the spot; gloo does without
    import torch
    import trl
    from transformers import TrainerCallback

    from support.callbacks import statuses
    from support.trainers import digit_reward, grpo_args, prompts
    from trl_parity import ParityCallback

    given, faulty = json.loads(settings), json.loads(bad)

    class Watch(TrainerCallback):
        """In the faulty steps the engine samples hotter than the loss thinks. Keeps weights and moments by step."""

        def __init__(self) -> None:
            self.kept: list[list[torch.Tensor]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.vllm_generation.temperature = 1.0 if state.global_step + 1 in faulty else trainer.temperature

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            engine = getattr(trainer.accelerator, "deepspeed_engine_wrapped", None)
            inner = trainer.optimizer if engine is None else engine.engine.optimizer
            while hasattr(inner, "optimizer"):
                inner = inner.optimizer
            moments = [t for p, moved in inner.state.items() for t in (p, *moved.values())]
            weights = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters() if p.requires_grad]
            local = [t.to_local() if hasattr(t, "to_local") else torch.as_tensor(t) for t in weights + moments]
            self.kept.append([t.detach().clone() for t in local])

    callback, watch = ParityCallback(**given["parity"]), Watch()
    args = grpo_args(
        Path(out), use_cpu="ACCELERATE_USE_CPU" in os.environ, bf16=False, ddp_backend="gloo",
        per_device_train_batch_size=8, max_steps=9,
        learning_rate=1e-4, **given["trainer"],
    )  # fmt: skip
    adapters = None
    if given["lora"]:
        from peft import LoraConfig

        adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer: Any = trl.GRPOTrainer(
        model=model, args=args, reward_funcs=digit_reward, train_dataset=prompts(), callbacks=[callback, watch],
        peft_config=adapters,
    )  # fmt: skip
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    pairs = zip(watch.kept, watch.kept[1:], strict=False)
    facts = {
        "statuses": statuses(callback),
        "changed": [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairs],
        "steps": trainer.state.global_step,
        "cause": None if callback.diagnosis is None else callback.diagnosis.cause,
        "skipped": callback._run.skipped,
        "moments": len(watch.kept[-1]) - sum(p.requires_grad for p in trainer.model.parameters()),
        "sharded_by": str(trainer.accelerator.distributed_type),
    }
    Path(out, f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(facts))


def shard_on_cpus() -> None:
    """accelerate wraps in FSDP only what runs on accelerators. Two gloo ranks are taken for such."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
