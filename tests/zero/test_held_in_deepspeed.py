"""A condemned update in DeepSpeed's own engine, without a trainer: every way its optimizers are put together."""

import pytest
from support.processes import run_on_two_ranks

RUN = """
from types import SimpleNamespace
import deepspeed
import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from trl_parity.live.held_updates import HeldUpdates
from trl_parity.trainers.instrumentation import Observer

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # to be compiled on the spot; gloo does without
deepspeed.init_distributed("gloo")


class Verdicts(Observer):
    on_generation = on_update = None

    def __init__(self, condemned):
        self.condemned, self.asked = condemned, 0

    def before_update(self):
        self.asked += 1
        return self.asked - 1 in self.condemned


def trained(config, updates, condemned):
    \"\"\"Weights, masters and moments of this rank after such updates of two micro-batches each.\"\"\"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    optimizer = torch.optim.AdamW(model.to(dtype).parameters(), lr=0.1, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    wrapped, verdicts = DeepSpeedEngineWrapper(engine), Verdicts(condemned)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(deepspeed_engine_wrapped=wrapped), model=engine.module,
        args=SimpleNamespace(world_size=2), callback_handler=SimpleNamespace(callbacks=[verdicts]),
    )
    held = HeldUpdates.of(trainer)
    for update in updates:
        for micro in (0, 1):
            seed = 100 * update + 10 * micro + torch.distributed.get_rank()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
            wrapped.backward(engine(x).float().square().mean() * 10, sync_gradients=micro == 1)
        held.over(verdicts.asked - 1 in condemned)
    assert verdicts.asked == len(updates)
    tensors = [torch.as_tensor(t) for p, moved in optimizer.state.items() for t in (p, *moved.values())]
    assert tensors
    return [t.detach().clone() for t in [*(getattr(p, "ds_tensor", p) for p in engine.module.parameters()), *tensors]]


for stage, bf16, offload in CASES:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": bf16},
        "zero_optimization": zero,
    }
    case = f"ZeRO-{stage} bf16={bf16} offload={offload}"
    kept, expected = trained(config, [0, 1, 2, 3], {1, 2}), trained(config, [0, 3], set())
    learned = trained(config, [0, 1, 2, 3], set())
    assert len(kept) == len(expected) > 4, case
    assert all(torch.equal(a, b) for a, b in zip(kept, expected)), case
    assert not all(torch.equal(a, b) for a, b in zip(kept, learned)), case
    print(case, flush=True)
print("ALL", flush=True)
"""

CASES = [
    *((stage, bf16, False) for stage in range(4) for bf16 in (False, True)),
    *((stage, bf16, True) for stage in (1, 2, 3) for bf16 in (False, True)),
]


def test_what_is_kept_is_what_the_other_updates_alone_would_give(tmp_path):
    """With accumulation and clipping, on two ranks: weights, fp32 masters, moments, bit for bit."""
    pytest.importorskip("deepspeed", reason="make test-deepspeed has it")
    run_on_two_ranks(f"CASES = {CASES}\n{RUN}", tmp_path)
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}.out").read_text().splitlines()[-1] == "ALL"
