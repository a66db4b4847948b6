"""Samples of tokens."""

from types import SimpleNamespace

import pytest
import torch

from trl_parity.metrics.tokens import sample_tokens, worst_tokens
from trl_parity.records import ScoredBatch


def test_tokens_of_a_scored_sample_are_those_of_their_rows():
    """Where TRL makes no pass, only some rows are scored, or all in another order: ids belong to their rows."""
    from support.incidents import batch, decode

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


def test_the_worst_tokens_are_those_of_largest_finite_difference_that_are_compared():
    delta = torch.tensor([[0.1, -3.0, 9.0, torch.nan], [torch.inf, 2.0, -0.2, 0.0]])
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]).bool()
    rollout = torch.full((2, 4), -1.0)
    scored = ScoredBatch(
        mask=mask, rollout_logprobs=rollout, trainer_logprobs=rollout + delta, own_logprobs=rollout, entropy=None
    )
    places = [(0, 1), (1, 1), (1, 2), (0, 0), (1, 3)]
    for count in (0, 2, 5, 99):
        found = worst_tokens(None, scored, count, None)
        assert [(row["sequence"], row["position"]) for row in found] == places[:count]
        assert [row["log_ratio"] for row in found] == pytest.approx([float(delta[at]) for at in places[:count]])
    assert {row["position"] for row in sample_tokens(scored, 99, seed=0)} == {0, 1, 2, 3}
    assert [row["entropy"] for row in sample_tokens(scored, 99, seed=0)] == [None] * 5


def test_tables_hold_the_worst_of_all_ranks_and_a_share_of_each(monkeypatch):
    from support.incidents import batch

    from trl_parity.metrics import tokens

    both = []
    monkeypatch.setattr(tokens, "gather_rows", lambda rows: both.extend(rows) or list(both))
    rollout, scored = batch(rows=4, columns=3)
    scored.trainer_logprobs.sub_(0.25)  # of either sign: -0.25 to 0.05
    for rank in (0, 1):
        accelerator = SimpleNamespace(process_index=rank, num_processes=2)
        worst, sample = tokens.tokens_of_all((rollout, scored), 7, 4, 3, None, accelerator)
    assert [(row["step"], row["rank"], row["sequence"]) for row in worst] == [(7, 0, 0)] * 3 + [(7, 1, 0)]
    assert [row["log_ratio"] for row in worst] == pytest.approx([-0.25] * 4)
    assert len(sample) == 3
    assert [len(part["sample"]) for part in both] == [2, 2]  # three of two ranks: two of each
    assert sample == [*sample_tokens(scored, 2, seed=14), *sample_tokens(scored, 2, seed=15)][:3]
    alone = SimpleNamespace(process_index=0, num_processes=1)
    assert tokens.tokens_of_all(None, 7, 4, 3, None, alone) == ([], [])
    assert len(both) == 2


def test_a_tokenizer_that_fails_costs_the_table_and_not_the_run(caplog):
    from support.incidents import batch

    from trl_parity.metrics.tokens import tokens_of_all

    def decode(ids):
        raise KeyError(ids[0])

    alone = SimpleNamespace(process_index=0, num_processes=1)
    worst, sample = tokens_of_all(batch(rows=4, columns=3), 7, 4, 3, decode, alone)
    assert (worst, len(sample)) == ([], 3)
    assert "tokens of step 7" in caplog.text
