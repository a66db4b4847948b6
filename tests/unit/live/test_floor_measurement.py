"""What the noise floor is measured with."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from trl_parity.live.floor_measurement import _against_itself, noise_dtype
from trl_parity.metrics.statistics import measure
from trl_parity.records import ScoredBatch
from trl_parity.trainers.capture import Capture
from trl_parity.trainers.some_rows import rows_of_tokens, rows_within


@pytest.mark.parametrize(
    ("engine", "mixed", "expected"),
    [
        (torch.bfloat16, "no", torch.bfloat16),
        (torch.float16, "bf16", torch.bfloat16),
        (torch.float32, "no", torch.float32),
        (torch.float32, "fp16", torch.float16),
    ],
)
def test_noise_has_the_coarser_dtype_of_both_sides(tiny_model, engine, mixed, expected):
    trainer = SimpleNamespace(accelerator=SimpleNamespace(mixed_precision=mixed))
    reader = SimpleNamespace(trainer=trainer, policy=tiny_model)
    capture = SimpleNamespace(compute_dtype=Capture.compute_dtype.fget(reader))
    assert noise_dtype(engine, capture) == expected


class Rows(Capture):
    """Of a Capture what chooses rows. ``counts``: what the other ranks say."""

    rollout = rewards = run_policy = log = None
    step = 0

    def __init__(self, ranks=1, sharded=False, counts=()):
        def gather(mine):
            return torch.cat([mine, torch.tensor(counts, dtype=mine.dtype)])

        self.trainer = SimpleNamespace(
            accelerator=SimpleNamespace(
                num_processes=ranks, gather=gather,
                distributed_type=DistributedType.FSDP if sharded else DistributedType.NO,
            )
        )  # fmt: skip


def rollout_of(rows, prompt, completion, lengths=None, same=0):
    """Random tokens; ``same``: of the first so many rows the tokens are those of the first."""
    generator = torch.Generator().manual_seed(0)
    prompts, completions = (torch.randint(0, 99, (rows, n), generator=generator) for n in (prompt, completion))
    if same:
        prompts[:same], completions[:same] = prompts[0], completions[0]
    lengths = torch.full((rows,), completion) if lengths is None else torch.tensor(lengths)
    mask = torch.arange(completion) < lengths[:, None]
    return SimpleNamespace(
        prompt_ids=prompts, prompt_mask=torch.ones_like(prompts), completion_ids=completions,
        completion_mask=mask.long(), engine_mask=mask, image_keys=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [(128, 128, 16), (512, 512, 8), (1024, 64, 30), (1500, 600, 8), (4000, 100, 8), (16, 8, 64), (100, 4000, 8)],
)
def test_a_floor_comes_from_several_sequences_however_long_their_prompts_are(prompt, completion, expected):
    rows = rows_of_tokens(Rows(), rollout_of(64, prompt, completion), 2048, 8).tolist()
    assert len(set(rows)) == len(rows) == expected


def test_rows_of_the_floor_are_those_with_tokens_and_each_of_another_completion():
    rows = Rows()
    lengths = [0] * 20 + [5] * 12
    assert set(rows_of_tokens(rows, rollout_of(32, 2000, 8, lengths), 2048, 8).tolist()) == set(range(20, 32))
    assert set(rows_of_tokens(rows, rollout_of(32, 20, 8, same=30), 2048, 8).tolist()) == {0, 30, 31}
    assert rows_of_tokens(rows, rollout_of(32, 20, 8, [0] * 32), 2048, 8).tolist() == []
    assert rows_of_tokens(Rows(ranks=4), rollout_of(32, 9, 4000), 2048, 8).tolist() == [0, 16]  # 8 over all ranks
    rows.step = 3
    assert rows_of_tokens(rows, rollout_of(16, 9, 256), 2048, 8).tolist() == [3, 5, 7, 9, 11, 13, 15, 1]


def test_the_own_pass_takes_rows_with_tokens_and_as_many_on_every_rank_of_a_sharded_model():
    assert rows_within(Rows(), rollout_of(8, 10, 10, [0, 0, 4, 0, 0, 4, 4, 0]), 40).tolist() == [2, 5]
    assert len(rows_within(Rows(), rollout_of(8, 10, 10, [0] * 8), 40)) == 1  # there is nothing better
    some = Rows(ranks=2, sharded=True, counts=[3])
    assert len(rows_within(some, rollout_of(8, 10, 10), 1000)) == 3
    assert rows_of_tokens(some, rollout_of(8, 10, 10, [0] * 7 + [4]), 2048, 8).tolist() == [7]
    none_here = rows_of_tokens(some, rollout_of(8, 10, 10, [0] * 8), 2048, 8)
    assert len(none_here) == 3  # the others' passes want this rank
    nowhere = Rows(ranks=2, sharded=True, counts=[0])
    assert len(rows_of_tokens(nowhere, rollout_of(8, 10, 10, [0] * 8), 2048, 8)) == 0


def test_groups_of_a_source_are_its_sequences_dealt_out():
    generator = torch.Generator().manual_seed(0)
    one, other = (-torch.rand(11, 6, generator=generator) for _ in range(2))
    mask = torch.rand(11, 6, generator=generator) < 0.8
    many = _against_itself(one, other, mask, 1 + 2 * torch.arange(11))  # rank 1 of 2
    assert [int(sums.totals()["sequences"]) for sums in many] == [0, 3, 0, 3, 0, 3, 0, 2]
    total = many[0].copy()
    for sums in many[1:]:
        total.add_(sums)
    whole = measure(
        ScoredBatch(mask=mask, rollout_logprobs=other, trainer_logprobs=one, own_logprobs=one, entropy=None),
        bootstrap_samples=2,
    )
    assert torch.equal(total.histogram, whole.histogram)
    assert total.totals()["k3"] == pytest.approx(whole.totals()["k3"])
