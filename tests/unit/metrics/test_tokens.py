"""Samples of tokens."""

import pytest
import torch

from trl_parity.records import ScoredBatch


def test_tokens_of_a_scored_sample_are_those_of_their_rows():
    """Where TRL makes no pass, only some rows are scored, or all in another order: ids belong to their rows."""
    from support.incidents import batch, decode

    from trl_parity.metrics.tokens import sample_tokens, worst_tokens
    from trl_parity.results.incident import sequence_rows

    rollout, scored = batch(rows=4, columns=3)
    for picked in ([2, 3, 0, 1], [3, 1]):
        rows = torch.tensor(picked)
        some = ScoredBatch(
            mask=scored.mask[rows], rollout_logprobs=scored.rollout_logprobs[rows],
            trainer_logprobs=scored.trainer_logprobs[rows], own_logprobs=scored.own_logprobs[rows],
            entropy=scored.entropy[rows], rows=rows,
        )  # fmt: skip
        for row in worst_tokens(rollout, some, 5, decode) + sequence_rows(rollout, some, decode, count=2):
            assert row["sequence"] in picked
            at = row["sequence"], row["position"]
            assert row["token_id"] == int(rollout.completion_ids[at])
            assert row["rollout_logprob"] == pytest.approx(float(rollout.rollout_logprobs[at]))
            assert row["log_ratio"] == pytest.approx(row["sequence"] / 10, abs=1e-6)
        sample = sample_tokens(some, 4, seed=0)
        assert len(sample) == 4
        assert all(set(row) == {"position", "entropy", "rollout_logprob", "trainer_logprob", "log_ratio"}
                   for row in sample)  # fmt: skip


def test_a_sample_is_uniform_finite_and_leaves_the_random_state_alone():
    from support.incidents import batch

    from trl_parity.metrics.tokens import sample_tokens

    _, scored = batch(rows=10, columns=10)
    scored.mask[0] = False
    scored.trainer_logprobs[1] = -float("inf")
    state = torch.get_rng_state()
    drawn = [row["rollout_logprob"] for seed in range(200) for row in sample_tokens(scored, 20, seed)]
    assert torch.equal(state, torch.get_rng_state())
    counts = torch.unique(torch.tensor(drawn), return_counts=True)[1]
    assert len(counts) == 80  # no token of the rows left out
    assert 25 < counts.min() <= counts.max() < 80  # 50 each, give or take


def test_tokens_of_tables_are_read_together():
    """One number read by itself is one wait for an accelerator."""
    from support.incidents import batch
    from torch.utils._python_dispatch import TorchDispatchMode

    from trl_parity.metrics.tokens import sample_tokens, worst_tokens

    one_by_one = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == "aten::_local_scalar_dense":
                one_by_one.append(func)
            return func(*args, **(kwargs or {}))

    rollout, scored = batch(rows=10, columns=10)
    with Reads():
        assert len(worst_tokens(rollout, scored, 20, lambda ids: str(ids))) == 20
        assert len(sample_tokens(scored, 50, seed=0)) == 50
    assert not one_by_one
