"""An engine that, asked again, does not give back what it said: answers of another prompt, or weights that changed."""

import copy

import pytest
import torch
from support.diagnosed import C

from trl_parity.diagnosis.diagnose import diagnose
from trl_parity.diagnosis.findings import NOTHING
from trl_parity.diagnosis.one_update_ago import one_update_ago
from trl_parity.diagnosis.probes import rescore
from trl_parity.diagnosis.probes.base import Unexplained
from trl_parity.diagnosis.probes.other_prompts import under_another_prompt
from trl_parity.diagnosis.selection import mean


@pytest.mark.slow_unit
def test_answers_under_each_others_prompts_are_told_by_what_they_fit(make_batch):
    """A healthy engine; the answers of rows 0 and 1 changed places before they were handed over."""
    batch = make_batch(own=True)
    ids, numbers = batch.rollout.completion_ids, batch.rollout.rollout_logprobs
    for x in (ids, numbers):
        x[[0, 1]] = x[[1, 0]]
    batch = make_batch(own=True, answers=(ids, numbers))
    assert under_another_prompt(make_batch(own=True), make_batch(own=True).start) is None
    found = under_another_prompt(batch, batch.start)
    assert found.cause == "token_misalignment"
    assert found.details == {"answers_of": {"0": 1, "1": 0}}
    assert found.finding.startswith(
        "2 of 4 sequences looked at answer another prompt of the batch: row 0 to the prompt of row 1"
    )
    assert mean(batch.residual(found.counterfactual)[0]) < 1e-6 < mean(batch.residual(batch.start)[0])
    assert diagnose(batch, 1).cause == "token_misalignment"


@pytest.mark.slow_unit
def test_older_weights_are_sure_where_those_of_one_update_ago_are_what_sampled(make_batch, models):
    policy, before = copy.deepcopy(models[0]), {}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.005, weight_decay=0.1)
    for _ in range(3):
        before = copy.deepcopy(policy)
        for parameter in policy.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    undone = one_update_ago(optimizer)
    for parameter, was in zip(policy.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(undone[parameter], was.detach(), rtol=1e-4, atol=1e-5)

    def told(sampled, newer_from=C, rows=None, factor=1.0):
        batch = make_batch(trained=(policy, sampled, optimizer))
        newer = (batch.column >= newer_from) & (batch.row < (batch.sequences if rows is None else rows))
        batch.start.reported.copy_(torch.where(newer, batch.as_scored, batch.start.reported))
        batch.start.reported.mul_(factor)
        held = {name: x.clone() for name, x in policy.state_dict().items()}
        found, _ = rescore.within_sequences(batch, batch.start, NOTHING)
        assert all(torch.equal(held[name], x) for name, x in policy.state_dict().items())
        assert found.cause in ("stale_weights", "in_flight_update")
        return found

    found = told(before)
    assert found.most == 1.0
    assert found.cause == "stale_weights"
    assert "of the drift, the weights before the last update leave 0%: it had these" in found.finding
    found = told(before, newer_from=C // 2)
    assert (found.cause, found.most) == ("in_flight_update", 1.0)
    assert "leave 0% and 48% of the tokens are of the weights it holds now" in found.finding
    assert told(before, newer_from=C - 1).cause == "in_flight_update"  # an eighth of them: they came late
    assert told(before, newer_from=C - 1, rows=1).cause == "stale_weights"  # one token of 48, by chance
    assert told(models[0]).most == 0.5  # three updates ago
    with pytest.raises(Unexplained, match=r"does not give back .*weights before the last update leave \d"):
        told(policy, factor=0.5)  # something else
    assert one_update_ago(torch.optim.SGD(policy.parameters(), lr=0.1)) == {}
    for parameter in policy.parameters():
        parameter.data = parameter.data.bfloat16()
    assert one_update_ago(optimizer) == {}  # rounded away
