"""What runs on each of several ranks: imported there alone."""

import os

import torch

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def reduce_on(directory, rank=RANK, world=WORLD):
    from accelerate import Accelerator

    from support.batches import random_batch
    from trl_parity.collectives import gather_rows
    from trl_parity.metrics.reduction import reduce_sums
    from trl_parity.metrics.statistics import measure
    from trl_parity.metrics.sums import MismatchSums

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    sums = MismatchSums.zeros()
    for i in range(rank):  # rank 0 has nothing, the others more and more
        sums.add_(
            measure(
                random_batch(torch.Generator().manual_seed(i), 3 * rank, 5, 0.1), first_sequence=rank * 100 + i * 30
            )
        )
    reduced = reduce_sums(sums, accelerator)
    rows = gather_rows([{"rank": rank}] * rank)
    torch.save((sums, reduced, rows), f"{directory}/{rank}.pt")


def sharded_head_on(directory, rank=RANK, world=WORLD):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    import trl_parity.scoring.scorer
    from trl_parity.records import SamplingSettings
    from trl_parity.scoring.scorer import CompletionScorer

    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(2, 40, (3 + rank, 12), generator=generator)  # uneven shards
    attention = torch.ones_like(ids)
    if rank == 1:
        attention[:, -5:] = 0  # nothing to compare on this rank

    def score(passes=1):
        settings = SamplingSettings()
        scorer = CompletionScorer(
            model, 5, temperature=0.7, sampling=settings, replay_sampling=False, chunk_bytes=1 << 20
        )
        with torch.no_grad(), scorer:
            for _ in range(passes):
                model(input_ids=ids, attention_mask=attention)
        return scorer

    expected = score().scores()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(score().scores(), expected)
    assert type(model.lm_head.weight).__name__ == "DTensor"

    # a failure on one rank alone, in the first of two passes: the others must not wait for it
    real, calls = trl_parity.scoring.scorer.score_tokens, []

    def failing(*args, **kwargs):
        calls.append(1)
        if rank == 0 and len(calls) == 1:
            raise RuntimeError("out of memory on rank 0")
        return real(*args, **kwargs)

    trl_parity.scoring.scorer.score_tokens = failing
    scorer = score(passes=2)
    assert (scorer.error is not None) == (rank == 0)
    assert len(calls) == (1 if rank == 0 else 2)
    dist.barrier()
    dist.destroy_process_group()
