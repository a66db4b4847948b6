"""A head whose weight lies in shards."""

import pytest
from support.models import save_tiny_model
from support.processes import run_on_two_ranks

pytestmark = pytest.mark.slow_unit


def test_a_sharded_head_is_scored_right_and_without_a_deadlock(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    code = "import sys\nfrom support.ranks import sharded_head_on\nsharded_head_on(sys.argv[1])"
    run_on_two_ranks(code, tmp_path, model)


ZERO3 = """
import sys
import deepspeed.ops
import torch
from transformers import AutoModelForCausalLM
from trl_parity.scoring.scorer import CompletionScorer
from trl_parity.records import SamplingSettings

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # to be compiled on the spot; gloo does without
deepspeed.init_distributed("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.randint(2, 40, (3, 12), generator=torch.Generator().manual_seed(torch.distributed.get_rank()))


def score(forward):
    scorer = CompletionScorer(
        model, 5, temperature=0.7, sampling=SamplingSettings(), replay_sampling=False, chunk_bytes=1 << 20
    )
    with torch.no_grad(), scorer:
        forward(input_ids=ids, attention_mask=torch.ones_like(ids))
    return scorer.scores()


expected = score(model)
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    },
)
assert model.lm_head.weight.numel() == 0, "the head is not sharded"
torch.testing.assert_close(score(engine), expected)
assert model.lm_head.weight.numel() == 0, "the head was left gathered"
"""


def test_a_zero3_head_is_gathered_and_let_go(tmp_path):
    pytest.importorskip("deepspeed", reason="make test-deepspeed has it")
    run_on_two_ranks(ZERO3, tmp_path, save_tiny_model(tmp_path / "model"), DS_ACCELERATOR="cpu")
