"""Runs on a real vLLM server process: weights that really move, faults named over HTTP, a server that fails.

The server is started in the mode a test needs, so tests that want the same one stand together: first log-probs as
sampled, then, after a restart in the middle of a run, raw ones; the last test kills it.
"""

import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from support.callbacks import lose_sync, statuses
from support.distillers import distiller
from support.models import save_tiny_model
from support.processes import free_port, run_on_two_ranks
from support.trainers import digit_reward, grpo_args, prompts
from support.vllm_server import Server

from trl_parity import ParityCallback, Status
from trl_parity.engine.cache_stats import server_counters, server_use
from trl_parity.engine.handle import EngineHandle
from trl_parity.engine.http import NoAnswer, ServerAPI
from trl_parity.engine.server import ServerEngine
from trl_parity.errors import ConfigError
from trl_parity.results.incident import read_incident

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(save_tiny_model(tmp_path_factory.mktemp("served")), tmp_path_factory.mktemp("log") / "server.log")
    yield server
    server.stop()


@pytest.fixture
def processed(server):
    return server.run("processed_logprobs")


@pytest.fixture
def raw(server):
    return server.run("raw_logprobs")


def make_trainer(server, output_dir, callback, kind="GRPO", **args):
    import trl

    settings = {"vllm_mode": "server", "vllm_server_base_url": server.url, "learning_rate": 3e-4, "max_steps": 4}
    config = grpo_args(output_dir, f"{kind}Config", **(settings | args))
    return getattr(trl, f"{kind}Trainer")(
        model=str(server.model_dir), args=config, reward_funcs=digit_reward, train_dataset=prompts(),
        callbacks=[callback],
    )  # fmt: skip


def scores(model, ids):
    """Log-prob of each token but the first, by the trainer's model at T = 1."""
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def after_sync(monkeypatch, act):
    """``act(n)`` after the n-th weight sync, before anything is generated with those weights."""
    from trl.generation.vllm_generation import VLLMGeneration

    real, calls = VLLMGeneration.sync_weights, []

    def sync(self):
        real(self)
        calls.append(1)
        act(len(calls))

    monkeypatch.setattr(VLLMGeneration, "sync_weights", sync)


def change_requests(monkeypatch, **changes):
    """What goes over the wire is not what TRL asked for."""
    from trl.generation.vllm_client import VLLMClient

    real = VLLMClient._post

    def post(self, url, **kwargs):
        if url.endswith("/v1/completions"):
            kwargs["json"] = kwargs["json"] | changes
        return real(self, url, **kwargs)

    monkeypatch.setattr(VLLMClient, "_post", post)


IDS = torch.randint(2, 44, (60,), generator=torch.Generator().manual_seed(0)).tolist()


# ---- a teacher ----------------------------------------------------------------------------------------------------


def test_a_teachers_server_that_leaves_the_temperature_aside_is_told(processed, tmp_path):
    """One server samples for the student and answers for the teacher, who is the student as saved."""
    callback = ParityCallback(floor_tokens=0, diagnose="never")
    trainer = distiller(
        "server_distillation", processed.model_dir, tmp_path, callback, vllm_mode="server", max_steps=2,
        vllm_server_base_url=processed.url, teacher_model_server_url=processed.url, temperature=0.7,
    )  # fmt: skip
    trainer.train()
    before, after = callback.verdicts  # the loss, and with it the teacher, comes after the first was judged
    assert before.stats["teacher/temperature_gap"] is None
    found = {name: after.stats[f"teacher/{name}"] for name in ("temperature_gap", "missing", "foreign")}
    assert found == {"temperature_gap": pytest.approx(0.3), "missing": 0.0, "foreign": 0.0}
    assert 0.1 < after.stats["teacher/mass"] <= after.stats["teacher/mass_max"] < 1.0 + 1e-4
    assert after.stats["teacher/logprob"] < -0.5
    assert after.warnings == ("teacher/temperature_gap",)
    assert "get_sequence_logprobs" not in vars(trainer.teacher_client)


# ---- weights that move ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_clean_run_stays_ok_while_its_weights_move_on_the_server(processed, tmp_path, monkeypatch, kind):
    asked = {"logprobs_mode": "processed_logprobs", "dtype": "bfloat16", "block_size": 32, "max_num_seqs": 16}
    callback = ParityCallback(engine_args=asked)  # which is how it was started
    trainer = make_trainer(processed, tmp_path, callback, kind, learning_rate=1e-3, max_steps=3)
    engine, seen = ServerEngine(trainer.vllm_generation.vllm_client), []

    def compare(n):
        [theirs] = engine.rescore([IDS])
        seen.append((theirs, scores(trainer.model, IDS)))

    after_sync(monkeypatch, compare)
    trainer.train()
    assert statuses(callback) == ["OK"] * 3
    assert len(seen) == 3
    for theirs, ours in seen:
        assert (theirs - ours).abs().mean() < 0.03  # bf16 against fp32
    assert (seen[2][0] - seen[0][0]).abs().mean() > 0.2  # and both have moved
    assert not list(Path(trainer.vllm_generation.vllm_client.communicator._directory.name).iterdir())
    loads = [v.stats for v in callback.verdicts]
    assert [s["engine/prefix_cache_hit_rate"] for s in loads] == [0.0] * 3  # of prompts shorter than a block
    assert all(s["engine/kv_cache_usage"] is None or 0 <= s["engine/kv_cache_usage"] < 0.1 for s in loads)


def test_counters_of_a_server_are_read_and_their_absence_is_said_once(processed, caplog):
    client = processed.client()
    before = server_counters(client)
    with server_use(client) as load:
        client.generate([list(range(2, 42))] * 4, max_tokens=4)  # 40 tokens, of which one block of 32 is kept
    assert server_counters(client).queries - before.queries == load.looked_up == 160
    assert 0 < load.cached <= 3 * 32
    gone = Gone(f"http://127.0.0.1:{free_port()}")
    assert server_counters(gone) is None
    assert server_counters(gone) is None
    assert caplog.text.count("does not tell its counters") == 1
    with server_use(gone) as load:
        pass
    assert (load.cached, load.looked_up, load.kv_usage) == (0, 0, None)


class Gone:
    def __init__(self, base_url):
        self.base_url = base_url


def test_a_server_that_runs_otherwise_than_asked_is_refused_with_the_line_that_mends_it(processed, tmp_path):
    callback = ParityCallback(engine_args={"preset": "rl", "max_num_seqs": 16})
    with pytest.raises(ConfigError) as refused:
        make_trainer(processed, tmp_path, callback, max_steps=1).train()
    text = str(refused.value)
    for words in (
        "enable_prefix_caching: asked False, runs with True", "hf_overrides.head_dtype: asked 'float32', runs with",
        f"Start the server with: vllm serve {processed.model_dir} --logprobs-mode processed_logprobs",
    ):  # fmt: skip
        assert words in text
    assert "max_num_seqs: asked" not in text


def test_the_floor_is_measured_in_the_servers_dtype(processed, tmp_path):
    callback = ParityCallback()
    make_trainer(processed, tmp_path, callback, bf16=False, learning_rate=1e-5, max_steps=2).train()
    assert statuses(callback) == ["OK", "OK"]  # of a float32 trainer: against its own rounding it would breach
    assert callback.monitor.floor.values["floor/logp_abs_diff/mean"] > 1e-3
    assert set(callback.monitor.floor.sources) == {"rounding", "batch_shape", "engine"}


def test_weights_are_delivered_in_files_of_bounded_size_and_a_refused_update_is_said(processed):
    from transformers import AutoModelForCausalLM

    from trl_parity.engine.weight_transfer import FileTransfer

    engine = ServerEngine(processed.client())
    model = AutoModelForCausalLM.from_pretrained(processed.model_dir, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    transfer = FileTransfer(processed.url, file_bytes=20_000)  # what TRL's async trainer takes as weight_transfer
    with pytest.raises(RuntimeError, match="before init_weight_transfer"):
        transfer.deliver([])
    transfer.init_weight_transfer()
    try:
        with pytest.raises(RuntimeError, match="/update_weights of the vLLM server answered 500"):
            transfer.send_weights([("no.such.tensor", torch.zeros(2))])
        transfer.pause()
        transfer.send_weights(model.named_parameters())
        transfer.resume()
        assert next(transfer._names) > 5  # files
    finally:
        transfer.destroy()
    assert (engine.rescore([IDS])[0] - scores(model, IDS)).abs().mean() < 0.05
    with pytest.raises(requests.RequestException):
        FileTransfer(f"http://127.0.0.1:{free_port()}", timeout=5).init_weight_transfer()


# ---- faults -----------------------------------------------------------------------------------------------------


def test_a_lost_sync_is_halted_and_named_over_http(processed, tmp_path, monkeypatch):
    lose_sync(monkeypatch)
    trainer = make_trainer(processed, tmp_path, callback := ParityCallback(), learning_rate=1e-3, max_steps=6)
    trainer.train()
    assert statuses(callback) == ["OK", "BREACH", "BREACH", "HALT"]
    found = callback.diagnosis
    assert found.cause == "stale_weights", found.summary
    assert "a server's parameters can't be read" in found.summary
    report = (callback.incident / "report.md").read_text()
    unasked = report.split("Not probed, so not ruled out:")[1]
    assert "a server does not hand out its weights" in unasked
    assert "a server does not tell the config of the model it built" in unasked


@pytest.mark.parametrize(
    ("sent", "cause", "words"),
    [({"temperature": 1.3}, "temperature", "emperature 1.3"), ({"top_p": 0.9}, "truncated_sampling", "op_p 0.90")],
)
def test_requests_changed_on_the_way_are_halted_and_named(processed, tmp_path, monkeypatch, sent, cause, words):
    change_requests(monkeypatch, **sent)
    make_trainer(processed, tmp_path, callback := ParityCallback()).train()
    assert statuses(callback) == ["BREACH", "BREACH", "HALT"]
    assert callback.diagnosis.cause == cause, callback.diagnosis.summary
    assert words in callback.diagnosis.summary


def test_an_answer_that_does_not_arrive_as_it_was_given_is_named(processed, tmp_path, monkeypatch):
    from trl.generation.vllm_generation import VLLMGeneration

    real = VLLMGeneration.generate

    def late(self, *args, **kwargs):
        prompt_ids, ids, logprobs, token_ids = real(self, *args, **kwargs)
        return prompt_ids, ids, [[row[0], *row[:-1]] for row in logprobs], token_ids

    monkeypatch.setattr(VLLMGeneration, "generate", late)
    make_trainer(processed, tmp_path, callback := ParityCallback(consecutive=1)).train()
    assert statuses(callback) == ["HALT"]
    assert callback.diagnosis.cause == "token_misalignment"
    assert "not those the engine returned" in callback.diagnosis.summary


# ---- a server that fails ----------------------------------------------------------------------------------------


def test_a_silent_server_costs_one_timeout_and_no_verdict(processed, tmp_path, monkeypatch, caplog):
    engine, waited = ServerEngine(processed.client(), timeout=5.0), []
    processed.freeze()
    try:
        start = time.perf_counter()
        with pytest.raises(ConnectionError, match="no answer from http"):
            engine.next_token([IDS[:9]] * 64, [5] * 64, 1.0, cached=False)
        with pytest.raises(ConnectionError, match="no answer"):
            engine.rescore([IDS])
        assert time.perf_counter() - start < 10  # 64 requests, 16 at once: one wait, and the rest is not asked
    finally:
        processed.thaw()

    class Alone(ParityCallback):
        """Has no answer from the server whenever it looks at a batch."""

        def on_generation(self, capture):
            processed.freeze()
            try:
                super().on_generation(capture)
            finally:
                processed.thaw()

    ask = ServerAPI.text

    def counted(self, method, path, *args, **kwargs):
        try:
            return ask(self, method, path, *args, **kwargs)
        except NoAnswer:
            waited.append(path)
            raise

    monkeypatch.setattr(ServerAPI, "text", counted)
    change_requests(monkeypatch, top_p=0.9)
    callback = Alone(server_timeout=1.0)
    make_trainer(processed, tmp_path, callback).train()
    assert statuses(callback) == ["BREACH", "BREACH", "HALT"]
    assert callback.diagnosis.cause == "truncated_sampling"  # from what is at hand
    unasked = [e.error for e in callback.diagnosis.evidence if "no engine to ask" in e.error]
    assert unasked
    assert caplog.text.count("the vLLM server does not tell its settings: no answer") == 1
    assert waited == ["/server_info?config_format=json"]  # over the whole run


RANKS = """
import sys
from pathlib import Path
from support.trainers import digit_reward, grpo_args, prompts
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl_parity import ParityCallback
model, out, url = sys.argv[1:]
sync, calls = VLLMGeneration.sync_weights, []


def once(self):
    calls.append(1)
    if len(calls) == 1:
        sync(self)


VLLMGeneration.sync_weights = once
callback = ParityCallback(consecutive=2)
args = grpo_args(Path(out), vllm_mode="server", vllm_server_base_url=url, max_steps=6, per_device_train_batch_size=8)
trainer = GRPOTrainer(model=model, args=args, reward_funcs=digit_reward, train_dataset=prompts(), callbacks=[callback])
assert trainer.accelerator.num_processes == 2
rank = trainer.accelerator.process_index
assert hasattr(trainer.vllm_generation, "vllm_client") == (rank == 0)
trainer.train()
lines = [f"{v.step} {v.status} {v.stats.num_tokens} {v.stats['kl_k3']!r}" for v in callback.verdicts]
d = callback.diagnosis
lines += [f"{d.cause} {d.explained!r} {d.confidence!r} {len(d.evidence)}", str(trainer.state.global_step)]
Path(out, f"rank{rank}.txt").write_text("\\n".join(lines))
"""


def test_two_ranks_of_which_one_talks_to_the_server_judge_and_diagnose_alike(processed, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run_on_two_ranks(RANKS, tmp_path, processed.model_dir, out, processed.url, ACCELERATE_USE_CPU="true")
    first, second = ((out / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    *lines, found, _ = first.splitlines()
    assert [line.split()[1] for line in lines] == ["OK", "BREACH", "HALT"]
    assert found.split()[0] == "stale_weights"


def test_a_server_restarted_with_other_settings_is_noticed_and_its_old_weights_measured(
    processed, tmp_path, monkeypatch, caplog
):
    # at temperature 1 a raw log-prob is a processed one, so what is measured is the weights alone
    callback = ParityCallback(consecutive=1, action="log")
    trainer = make_trainer(processed, tmp_path, callback, temperature=1.0, learning_rate=1e-3)
    after_sync(monkeypatch, lambda n: processed.run("raw_logprobs") if n == 3 else None)
    trainer.train()
    assert statuses(callback) == ["OK", "OK", "HALT", "OK"]  # the next sync reaches the new server
    assert callback.diagnosis.cause == "stale_weights", callback.diagnosis.summary
    [told] = [r.message for r in caplog.records if "was restarted" in r.message]
    assert "logprobs_mode was processed_logprobs, is raw_logprobs" in told
    engine = read_incident(callback.incident).engine
    assert engine["logprobs_mode"] == "raw_logprobs"
    assert engine["logprobs_mode at the start"] == "processed_logprobs"
    assert engine["restarts"] == 1


# ---- a server in vLLM's default mode ----------------------------------------------------------------------------


def test_settings_are_read_from_the_live_server(raw):
    client = raw.client()
    engine = EngineHandle().get(SimpleNamespace(mode="server", vllm_client=client))
    assert engine.settings() == {
        "logprobs_mode": "raw_logprobs",  # vLLM's default, and a trap
        "engine_dtype": "bfloat16",
        "engine_head_dtype": "bfloat16",
        "kv_cache_dtype": "auto",
        "quantization": None,
        "prefix_caching": True,
    }
    assert (engine.dtype, engine.max_model_len) == (torch.bfloat16, 128)
    assert engine.everything() | {"url": raw.url, "max_num_seqs": 16, "enforce_eager": True} == engine.everything()
    assert EngineHandle().get(SimpleNamespace(mode="server", vllm_client=None)) is None
    assert EngineHandle().get(None) is None


def test_tokens_are_scored_again_by_prefill_and_one_by_one(raw):
    from transformers import AutoModelForCausalLM

    from trl_parity.engine.weight_transfer import FileTransfer
    from trl_parity.lint.rules import Facts, lint
    from trl_parity.records import SamplingSettings

    engine = ServerEngine(raw.client())
    model = AutoModelForCausalLM.from_pretrained(raw.model_dir, dtype=torch.float32)
    transfer = FileTransfer(raw.url)
    transfer.init_weight_transfer()
    transfer.send_weights(model.named_parameters())  # over those of an earlier test
    transfer.destroy()
    sequences = [IDS[:9], IDS[:40], IDS]
    found = engine.rescore(sequences)
    for ids, mine in zip(sequences, found, strict=True):
        assert (mine - scores(model, ids)).abs().max() < 0.1  # bf16 against fp32
        assert (mine - scores(model, ids)).abs().mean() < 0.02
    contexts, targets = [ids[:-1] for ids in sequences], [ids[-1] for ids in sequences]
    for cached in (True, False):
        asked, read = engine.next_token(contexts, targets, 0.5, cached=cached)
        last = torch.stack([s[-1] for s in found])
        torch.testing.assert_close(asked, last, atol=0.03, rtol=0)  # raw: the temperature does not show
        assert read.tolist() == [float(cached)] * 3
    facts = Facts(sampling=SamplingSettings(temperature=0.5), trainer_temperature=0.5, replayed=True)
    told = {
        f.cause: f.severity for f in lint(Facts(**(asdict(facts) | {"sampling": facts.sampling} | engine.settings())))
    }
    assert told["raw_logprobs"] == "error"


def test_an_error_of_the_server_is_said(raw):
    with pytest.raises(RuntimeError, match="/v1/completions of the vLLM server answered 400"):
        ServerEngine(raw.client()).rescore([[5] * 400])


def test_a_run_on_a_server_in_raw_mode_is_halted_and_its_cause_named(raw, tmp_path, caplog):
    trainer = make_trainer(raw, tmp_path, callback := ParityCallback(), temperature=0.6)
    trainer.train()
    assert callback.status is Status.HALT
    assert callback.diagnosis.cause == "raw_logprobs", callback.diagnosis.summary
    assert "logprobs_mode of the live engine: raw_logprobs" in callback.diagnosis.summary
    assert "the engine returns raw_logprobs" in caplog.text  # said before the first update
    assert callback.diagnose().cause == "raw_logprobs"
    with pytest.raises(Exception, match="colocated engine"):
        callback.diagnose(heal=True)


def test_a_server_that_is_gone_ends_the_run_as_trl_would_and_nothing_passes_for_healthy(raw, tmp_path, monkeypatch):
    from requests.adapters import HTTPAdapter

    trainer = make_trainer(raw, tmp_path, callback := ParityCallback(), temperature=1.0)
    trainer.vllm_generation.vllm_client.session.mount("http://", HTTPAdapter())  # else TRL tries again for a minute
    after_sync(monkeypatch, lambda n: raw.stop() if n == 3 else None)
    with pytest.raises(requests.ConnectionError):
        trainer.train()
    assert statuses(callback) == ["OK", "OK"]
    assert len((tmp_path / "parity" / "metrics.jsonl").read_text().splitlines()) == 2
    assert EngineHandle(5.0).get(trainer.vllm_generation) is None
    with pytest.raises(requests.ConnectionError):  # a sync that does not arrive is no silence
        trainer.vllm_generation.sync_weights()
