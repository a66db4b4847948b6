"""A real vLLM server process, asked over HTTP what a diagnosis and the settings check ask."""

import socket
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from support import environment, save_tiny_model

from trl_parity.engine.server import ServerEngine, server_of

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    from trl.generation.vllm_client import VLLMClient

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = environment(VLLM_SERVER_DEV_MODE="1", OMP_NUM_THREADS="1", VLLM_LOGGING_LEVEL="ERROR")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--block-size", "32"]
    command += ["--dtype", "bfloat16", "--max-num-seqs", "16"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            for _ in range(240):
                try:
                    client = VLLMClient(base_url=f"http://127.0.0.1:{port}")
                    break
                except Exception:  # not up yet, however it says so: a dead one fails here, a silent one below
                    assert process.poll() is None, log.read_text()[-3000:]
                    time.sleep(1)
            else:
                pytest.fail(f"the server did not come up: {log.read_text()[-2000:]}")
            yield client
        finally:
            process.terminate()
            process.wait(60)


def test_settings_are_read_from_the_live_server(server):
    engine = server_of(SimpleNamespace(mode="server", vllm_client=server))
    assert engine.settings() == {
        "logprobs_mode": "raw_logprobs",  # vLLM's default, and a trap
        "engine_dtype": "bfloat16",
        "engine_head_dtype": "bfloat16",
        "kv_cache_dtype": "auto",
        "quantization": None,
        "prefix_caching": True,
    }
    assert (engine.dtype, engine.max_model_len) == (torch.bfloat16, 128)
    assert engine.everything()["url"].startswith("http://127.0.0.1")
    assert server_of(SimpleNamespace(mode="server", vllm_client=None)) is None
    assert server_of(SimpleNamespace(mode="colocate", llm=None)) is None


def test_tokens_are_scored_again_by_prefill_and_one_by_one(server, model_dir):
    from transformers import AutoModelForCausalLM

    from trl_parity.lint import Facts, lint
    from trl_parity.records import SamplingSettings

    engine = ServerEngine(server)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(2, 44, (n,), generator=generator).tolist() for n in (9, 40, 70)]
    scores = engine.rescore(sequences)
    for ids, mine in zip(sequences, scores, strict=True):
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (mine - expected).abs().max() < 0.1  # bf16 against fp32
        assert (mine - expected).abs().mean() < 0.02
    contexts, targets = [ids[:-1] for ids in sequences], [ids[-1] for ids in sequences]
    for cached in (True, False):
        asked, read = engine.next_token(contexts, targets, 0.5, cached=cached)
        last = torch.stack([s[-1] for s in scores])
        torch.testing.assert_close(asked, last, atol=0.03, rtol=0)  # raw: the temperature does not show
        assert read.tolist() == [float(cached)] * 3
    facts = Facts(sampling=SamplingSettings(temperature=0.5), trainer_temperature=0.5, replayed=True)
    found = {
        f.cause: f.severity for f in lint(Facts(**(asdict(facts) | {"sampling": facts.sampling} | engine.settings())))
    }
    assert found["raw_logprobs"] == "error"


def test_an_error_of_the_server_is_said(server):
    with pytest.raises(RuntimeError, match="the server answered 400"):
        ServerEngine(server).rescore([[5] * 400])


def test_a_run_on_a_server_in_raw_mode_is_halted_and_its_cause_named(server, model_dir, tmp_path, monkeypatch, caplog):
    """Real rollouts over HTTP. Nothing is learned (lr 0): TRL's weight transfer needs CUDA."""
    from support import digit_reward, grpo_args, prompts
    from trl import GRPOTrainer
    from trl.generation.vllm_client import VLLMClient
    from trl.generation.vllm_generation import VLLMGeneration

    from trl_parity import ParityCallback, Status

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda *a, **k: None)
    monkeypatch.setattr(VLLMClient, "close_communicator", lambda *a, **k: None, raising=False)
    monkeypatch.setattr(VLLMGeneration, "sync_weights", lambda self: None)
    callback = ParityCallback()
    args = grpo_args(
        tmp_path, vllm_mode="server", vllm_server_base_url=server.base_url, learning_rate=0.0, max_steps=4,
        temperature=0.6,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(model_dir), args=args, reward_funcs=digit_reward, train_dataset=prompts(), callbacks=[callback]
    )
    trainer.train()
    assert callback.status is Status.HALT
    assert callback.diagnosis.cause == "raw_logprobs", callback.diagnosis.summary
    assert "logprobs_mode of the live engine: raw_logprobs" in callback.diagnosis.summary
    assert "the engine returns raw_logprobs" in caplog.text  # said before the first update
    found = callback.diagnose()
    assert found.cause == "raw_logprobs"
    with pytest.raises(Exception, match="colocated engine"):
        callback.diagnose(heal=True)
