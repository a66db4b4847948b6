"""DeepSpeed's updates, made inside backward: its optimizers' step with a real torch optimizer inside, no DeepSpeed."""

from types import SimpleNamespace

import pytest
import torch
from support.trainer_loop import FlatOptimizer, Loop
from transformers.training_args import OptimizerNames

from trl_parity import ParityCallback, ParityHalt
from trl_parity.errors import ConfigError, InterceptionError
from trl_parity.live.held_updates import refuse_unheld


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """A run of it; ``bad``: the batches that drifted."""
    monkeypatch.setattr("trl_parity.live.callback.prepare_cpu_engine", lambda: False)
    usual = {"consecutive": 1, "floor_tokens": 0, "diagnose": "never", "rich_every_n_windows": 0}

    def make(*bad, feeds=1, accumulate=1, hidden=(), **settings):
        watch = ParityCallback(**(usual | {"action": "skip_update", "bootstrap_samples": 10} | settings))
        return Loop(
            watch, tmp_path, feeds=feeds, accumulate=accumulate, hidden=hidden, deepspeed=True,
            shifts=lambda batch: float(batch in bad),
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("feeds", "accumulate", "epochs"), [(1, 1, (3, 3)), (8, 4, (16,)), (1, 4, (6, 6)), (7, 4, (14, 14))]
)
def test_weights_and_moments_are_those_of_the_other_updates_alone(loop, feeds, accumulate, epochs):
    for bad in range(sum(epochs) // feeds):
        run = loop(bad, feeds=feeds, accumulate=accumulate)
        run.run(*epochs)
        condemned = {b for b, step in run.generated_in.items() if step == run.generated_in[bad]}
        expected = FlatOptimizer(torch.nn.Parameter(torch.ones(1)))
        for i, (fed, applied) in enumerate(run.updates):
            assert applied is condemned.isdisjoint(fed), (bad, fed, run.updates)
            if applied:
                expected.parameter.grad = torch.full((1,), i + 1.0)
                expected.step()
        assert run.callback._run.skipped == sum(not applied for _, applied in run.updates)
        assert torch.equal(run.parameter, expected.parameter)
        kept, moments = run.flat.optimizer.state[run.flat.copy], expected.optimizer.state[expected.copy]
        assert all(torch.equal(kept[name], moments[name]) for name in moments)  # exp_avg, exp_avg_sq, step


def test_stop_keeps_the_condemned_batch_out_and_raise_comes_before_it(loop):
    run = loop(2, action="stop")
    assert run.run(6) == [((0,), True), ((1,), True), ((2,), False)]
    run = loop(2, action="raise")
    with pytest.raises(ParityHalt):
        run.run(6)
    assert run.updates == [((0,), True), ((1,), True)]


@pytest.mark.parametrize("action", ["raise", "stop"])
def test_a_batch_that_went_missing_is_noticed_before_its_update(loop, action):
    run = loop(hidden={2}, action=action, halt_on_error=True)
    if action == "stop":
        assert run.run(6)[2:] == [((2,), False)]
    else:
        with pytest.raises(ParityHalt, match="no rollout batch was intercepted for this step"):
            run.run(6)
    expected = FlatOptimizer(torch.nn.Parameter(torch.ones(1)))
    for gradient in (1.0, 2.0):
        expected.parameter.grad = torch.full((1,), gradient)
        expected.step()
    assert torch.equal(run.parameter, expected.parameter)


def test_weights_that_move_past_the_optimizer_are_an_error_at_the_first_condemned_batch(loop):
    run = loop(1)
    step = run.flat.step

    def elsewhere():
        step()
        run.flat.copy.data.add_(1e-6)

    run.flat.step = elsewhere
    with pytest.raises(ConfigError, match="DeepSpeed moved weights in an update whose step did nothing"):
        run.run(4)
    assert len(run.updates) == 1


def test_a_condemned_batch_whose_update_was_not_seen_is_an_error(loop):
    run = loop(1)
    run.flat.step, generate = lambda: None, run.generate

    def other_optimizer(*args):
        generate(*args)
        run.flat = SimpleNamespace(step=lambda: None)

    run.generate = other_optimizer
    with pytest.raises(InterceptionError, match="DeepSpeed's optimizer made no step"):
        run.run(4)


def test_a_trainer_that_trains_again_counts_each_update_once(loop):
    run = loop(1, 3)
    run.run(2)
    run.state.global_step = 0
    run.run(2)
    assert [applied for _, applied in run.updates] == [True, False] * 2
    assert run.callback._run.skipped == 1  # of the second run


def arguments(optim="adamw_torch", **config):
    return SimpleNamespace(optim=optim, deepspeed_plugin=SimpleNamespace(deepspeed_config=config))


UNHELD = {
    "zenflow": arguments(zero_optimization={"stage": 2, "zenflow": {"topk_ratio": 0.1}}),
    "super_offload": arguments(zero_optimization={"offload_optimizer": {"device": "cpu", "super_offload": True}}),
    "'Muon'": arguments(optimizer={"type": "Muon", "params": {}}),
    "'galore_adamw_layerwise'": SimpleNamespace(optim=OptimizerNames.GALORE_ADAMW_LAYERWISE, deepspeed_plugin=None),
}


@pytest.mark.parametrize("named", UNHELD)
def test_what_updates_within_backward_is_refused_where_it_would_have_to_be_held(named):
    for action in ("skip_update", "stop"):
        with pytest.raises(ConfigError, match=f"{named} with action='{action}'"):
            refuse_unheld(UNHELD[named], action)
    for action in ("raise", "log"):
        refuse_unheld(UNHELD[named], action)


def test_what_can_be_held_is_not_refused():
    for stage in range(4):
        zero = {"stage": stage, "offload_optimizer": {"device": "cpu", "ratio": 0.5}, "zenflow": None}
        refuse_unheld(arguments(zero_optimization=zero, optimizer={"type": "AdamW"}), "stop")
    refuse_unheld(SimpleNamespace(optim="adamw_torch", deepspeed_plugin=None), "stop")
    refuse_unheld(SimpleNamespace(), "stop")
