"""ParityCallback on real asynchronous GRPO: TRL's trainer, its worker process, a vLLM server, weights that move.

On a CPU, plain torch stands in for FlashAttention 3 behind TRL's tree attention, and weights go through files
(``async_stack.py``). What needs GPUs and is not shown here: that kernel, NCCL, FSDP2, adapter syncs.
"""

import copy
import time

import pytest
import torch
from support.async_stack import NoTransfer, Replay, async_trainer, lossy, on_a_cpu, sampled
from support.callbacks import Recorder, jsonl, parameters, statuses
from support.models import save_tiny_model
from support.processes import run_on_two_ranks
from support.vllm_server import Server

from trl_parity import ParityCallback, Status

pytestmark = pytest.mark.engine
NOWHERE = "http://127.0.0.1:9"  # nobody listens


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    on_a_cpu()
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def samples(model_dir):
    """40 of one turn each; tests change copies."""
    return sampled(model_dir, 40)


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    """Its address. In vLLM's default mode, raw log-probs: right at temperature 1, and a fault at any other."""
    server = Server(model_dir, tmp_path_factory.mktemp("log") / "server.log")
    try:
        yield server.run("raw_logprobs").url
    finally:
        server.stop()


def replayed(model_dir, output_dir, *callbacks, samples, url=NOWHERE, transfer=None, **args):
    """A trainer that learns from given samples."""
    settings = {"per_device_train_batch_size": 8, "vllm_server_base_url": url, "max_staleness": 100}
    return async_trainer(
        model_dir, output_dir, *callbacks, transfer=transfer or NoTransfer(),
        worker=Replay(copy.deepcopy(samples)), **(settings | args),
    )  # fmt: skip


def live(model_dir, output_dir, server, *callbacks, arrive=1000, **args):
    """A trainer with its own worker process, on the server."""
    # short queues: the worker stops at once when it has nothing left to hand over
    settings = {"vllm_server_base_url": server, "queue_maxsize": 16}
    return async_trainer(model_dir, output_dir, *callbacks, transfer=lossy(arrive)(server), **(settings | args))


# ---- what rides along -------------------------------------------------------------------------------------------


def test_samples_are_rebuilt_with_lags_and_scored_in_the_losss_own_pass(model_dir, tmp_path):
    """Two turns, shared prompts, four micro-batches in two steps, versions as a worker tags them."""
    samples = sampled(model_dir, 20, turns=2)
    for i, sample in enumerate(samples):
        # TRL's loader fetches one batch ahead: the first of step 2 comes from before its sync, whatever is queued
        sample.model_version = 2 if i in (12, 14) or i >= 16 else 1
        sample.enqueued_at = {13: 0.0, 15: time.time() + 3600}.get(i)
    callback = Recorder(lag_probe_tokens=0, floor_tokens=0)
    trainer = replayed(
        model_dir, tmp_path, callback, samples=samples, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        max_steps=2, learning_rate=0.0, bf16=False,
    )  # fmt: skip
    calls = []
    trainer.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 4  # no forward was added
    assert [(line["step"], line["num_batches"]) for line in jsonl(tmp_path)] == [(1, 2), (2, 2)]
    by_ids = {tuple(s.input_ids.tolist()): (i, s) for i, s in enumerate(samples)}
    seen = {}
    for rollout, scored in callback.seen:
        for row in range(len(rollout.prompt_ids)):
            real = rollout.completion_mask[row].bool()
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()].tolist()
            i, sample = by_ids[tuple(prompt + rollout.completion_ids[row][real].tolist())]
            n = len(prompt)
            assert sample.completion_mask[:n].sum() == 0
            assert rollout.engine_mask[row][real].tolist() == sample.completion_mask[n:].astype(bool).tolist()
            trained = rollout.engine_mask[row]
            expected = torch.tensor(sample.old_log_probs[n:])[trained[real]]
            assert torch.equal(rollout.rollout_logprobs[row][trained], expected)
            # nothing was learned, so the trainer says what the model said that sampled, in every context
            for mine in (scored.trainer_logprobs, scored.own_logprobs):
                torch.testing.assert_close(mine[row][trained], expected, atol=1e-5, rtol=0)
            mask = scored.mask[row] | scored.stale[row]
            assert torch.equal(mask, trained)
            assert bool(scored.mask[row].any()) == (rollout.lags[row] == 0)
            seen[i] = (rollout.step, int(rollout.lags[row]), int(rollout.in_flight[row]))
    assert {i: lag for i, (_, lag, _) in seen.items()} == {i: int(8 <= i < 12 or i in (13, 15)) for i in range(16)}
    assert (seen[13][2], seen[14][2], seen[15][2]) == (0, -1, 1)
    tokens = [int(s.completion_mask.sum()) for s in samples]
    fresh, stale = tokens[12] + tokens[14], sum(tokens[8:12]) + tokens[13] + tokens[15]
    stats = callback.verdicts[-1].stats
    assert (stats.num_tokens, stats["lag/0/tokens"], stats["lag/1/tokens"]) == (fresh, fresh, stale)
    assert stats["lag"] == 6 / 8
    assert stats["lag/in_flight_share"] == pytest.approx(tokens[15] / (tokens[13] + tokens[15]))
    assert stats["reward/mean"] == pytest.approx(sum(i / 20 for i in range(8, 16)) / 8)
    assert stats["temperature/engine"] == 1.0


# ---- what can't be measured -------------------------------------------------------------------------------------


def test_without_probes_steps_on_stale_samples_alone_are_no_data(model_dir, samples, tmp_path):
    callback = ParityCallback(lag_probe_tokens=0)
    trainer = replayed(model_dir, tmp_path, callback, samples=samples, max_steps=4)
    trainer.train()
    assert statuses(callback) == ["OK", "NO_DATA", "NO_DATA", "NO_DATA"]
    assert "no token at lag 0" in callback.verdicts[-1].reason
    row = next(row for row in trainer.state.log_history if row.get("step") == 4)
    assert row["parity/lag"] == 3
    assert row["parity/lag/3_4/kl_k3"] > 100 * callback.verdicts[0].stats["kl_k3"]
    assert row["parity/policy_drift/kl_k3"] == pytest.approx(row["parity/lag/3_4/kl_k3"], rel=0.05)
    assert "parity/kl_k3" not in row


def test_a_server_that_can_not_be_probed_is_an_error_window_and_training_goes_on(model_dir, samples, tmp_path):
    callback = ParityCallback()
    trainer = replayed(model_dir, tmp_path, callback, samples=samples, max_steps=3)
    trainer.train()
    assert statuses(callback) == ["OK", "ERROR", "ERROR"]
    assert "could not be probed after the weight sync: ConnectionError" in callback.verdicts[1].reason
    assert trainer.state.global_step == 3


def test_a_version_that_no_sync_made_is_an_error_window(model_dir, samples, tmp_path):
    strange = copy.deepcopy(samples[:24])
    for sample in strange[8:]:
        sample.model_version = -7
    callback = ParityCallback(lag_probe_tokens=0)
    trainer = replayed(model_dir, tmp_path, callback, samples=strange, max_steps=2)
    trainer.train()
    assert statuses(callback) == ["OK", "ERROR"]
    assert "8 of 8 samples come from a weight version that no sync" in callback.verdicts[1].reason


# ---- on the live server -----------------------------------------------------------------------------------------


def test_training_is_bit_equal_with_and_without_the_callback(model_dir, samples, tmp_path, server):
    """With all it does: probes, noise floor, breaches (no weights arrive at the server) and a diagnosis."""
    weights = {}
    for name in ("with", "without"):
        callbacks = [ParityCallback(action="log")] if name == "with" else []
        with_sync = lossy(1)(server)
        trainer = replayed(model_dir, tmp_path / name, *callbacks, samples=samples, url=server, transfer=with_sync)
        trainer.train()
        weights[name] = parameters(trainer)
        if callbacks:
            assert statuses(*callbacks) == ["OK", "BREACH", "BREACH", "HALT"]
            assert callbacks[0].diagnosis.cause == "stale_weights"
    for name, value in weights["with"].items():
        assert torch.equal(value, weights["without"][name]), name


def test_a_clean_run_lags_and_is_healthy(model_dir, tmp_path, server):
    callback = Recorder()
    live(model_dir, tmp_path, server, callback, max_steps=5, queue_maxsize=1).train()
    assert set(statuses(callback)) <= {"OK", "WARN"}
    lines = jsonl(tmp_path)
    assert [line["lag"] for line in lines[:2]] == [0, 1]  # one batch ahead at least
    for line in lines[1:]:
        stale = [line[f"lag/{name}/kl_k3"] for name in ("1", "2", "3_4", "5_up")]
        assert max(x for x in stale if x is not None) > 20 * line["kl_k3"]  # staleness shows where it belongs
        assert line["num_tokens"] == line["lag/0/tokens"] + line["lag/probe_tokens"]
        assert line["lag/probe_tokens"] >= 8 * 32  # up to 16 * 32, fewer where a sequence ended
        assert line["kl_k3"] < 1e-3
        assert set(line["warnings"]) <= {"policy_drift/kl_k3"}
    crossed = [line["lag/in_flight_share"] for line in lines]  # handed over after the sync that aged them began
    assert crossed[0] == 0 < max(crossed)
    probes = [rollout for rollout, _ in callback.seen if rollout.probe]
    assert len(probes) == 4
    for rollout in probes:  # they begin early and late in the completions
        lengths = rollout.prompt_mask.sum(1)
        assert len(lengths) == 16
        assert lengths.max() - lengths.min() > 12


def test_fresh_samples_are_judged_with_the_probe(model_dir, tmp_path, server):
    """TRL's max_staleness=0 still trains on lag 1, since its loader fetches a batch before the sync that ages it."""
    callback = ParityCallback()
    live(model_dir, tmp_path, server, callback, max_steps=3, gradient_accumulation_steps=2, max_staleness=0).train()
    assert set(statuses(callback)) <= {"OK", "WARN"}
    last = jsonl(tmp_path)[-1]
    assert last["lag/0/tokens"] > 0
    assert last["lag/1/tokens"] > 0
    assert last["lag/0/kl_k3"] < 1e-3 < last["lag/1/kl_k3"]
    assert last["num_tokens"] == last["lag/0/tokens"] + last["lag/probe_tokens"]


def test_raw_log_probs_are_named_however_far_samples_lag(model_dir, tmp_path, server):
    callback = ParityCallback()
    live(model_dir, tmp_path, server, callback, max_steps=20, temperature=0.7).train()
    assert statuses(callback) == ["BREACH", "BREACH", "HALT"]
    assert callback.diagnosis.cause == "raw_logprobs"
    assert jsonl(tmp_path)[-1]["lag"] > 0
    assert "raw_logprobs: explains" in callback.halt_message


def test_weights_that_do_not_arrive_are_named_and_the_condemned_batch_is_not_learned_from(model_dir, tmp_path, server):
    """The versions say that every sync arrived, so no lag of theirs shows it."""
    from transformers import TrainerCallback

    class Snapshots(TrainerCallback):
        before, after = None, None

        def on_step_begin(self, *args, model=None, **kwargs):
            self.before = {k: v.detach().clone() for k, v in model.named_parameters()}

        def on_step_end(self, *args, model=None, **kwargs):
            self.after = {k: v.detach().clone() for k, v in model.named_parameters()}

    callback, snapshots = ParityCallback(), Snapshots()
    trainer = live(model_dir, tmp_path, server, callback, snapshots, arrive=1, max_steps=20)
    trainer.train()
    assert statuses(callback) == ["OK", "BREACH", "BREACH", "HALT"]
    assert trainer.state.global_step == 4
    assert callback.diagnosis.cause == "stale_weights"
    assert all(torch.equal(value, snapshots.after[name]) for name, value in snapshots.before.items())
    assert callback.status is Status.HALT


RANKS = """
import sys
from pathlib import Path
from support.async_stack import Replay, async_trainer, lossy, on_a_cpu, sampled
from trl_parity import ParityCallback

model, out, url = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
on_a_cpu()
callback = ParityCallback()
trainer = async_trainer(
    model, out, callback, transfer=lossy(1)(url), worker=Replay(sampled(model, 56)), vllm_server_base_url=url,
    max_steps=6, max_staleness=100, ddp_backend="gloo", per_device_train_batch_size=4,
)
trainer.train()
rank = trainer.accelerator.process_index
assert trainer.accelerator.num_processes == 2
lines = [f"{v.step} {v.status} {v.stats.num_tokens} {v.stats['kl_k3']!r} {v.stats['lag']!r} {v.stats['reward/mean']!r}"
         for v in callback.verdicts]
d = callback.diagnosis
lines.append("none" if d is None else f"{d.cause} {d.explained!r} {d.confidence!r} {len(d.evidence)}")
weight = sum(float(p.double().sum()) for p in trainer.model.parameters())
Path(out, f"rank{rank}.txt").write_text("\\n".join([*lines, f"{weight!r} {trainer.state.global_step}"]))
"""


def test_two_ranks_reach_the_same_verdicts_on_one_probe(model_dir, tmp_path, server):
    run_on_two_ranks(RANKS, tmp_path, model_dir, tmp_path, server, ACCELERATE_USE_CPU="true")
    first, second = ((tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second  # verdicts, statistics to the last digit, weights
    *lines, found, _ = first.splitlines()
    assert [line.split()[1] for line in lines] == ["OK", "BREACH", "BREACH", "HALT"]
    assert [float(line.split()[4]) for line in lines] == [0, 1, 2, 3]
    # step 1: all eight samples of both ranks; then the probe's tokens, counted once
    tokens = [int(s.completion_mask.sum()) for s in sampled(model_dir, 8)]
    assert int(lines[0].split()[2]) == sum(tokens)
    assert all(8 * 8 <= int(line.split()[2]) <= 512 for line in lines[1:])
    assert found.split()[0] == "stale_weights"
