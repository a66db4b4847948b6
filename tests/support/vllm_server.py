"""A real vLLM server process."""

import json
import os
import signal
import time

import pytest
import requests

from support import warm
from support.processes import environment, free_port


class Server:
    """One vLLM server process at a time, always at the same address."""

    def __init__(self, model_dir, log):
        self.model_dir, self.log, self.port = model_dir, log, free_port()
        self.url, self.mode, self.process = f"http://127.0.0.1:{self.port}", None, None

    def run(self, mode):
        """A server that reports log-probs in this mode: the one that runs, or another in its place."""
        if self.mode != mode:
            self.stop()
            self.start(mode)
        return self

    def start(self, mode):
        env = environment(VLLM_SERVER_DEV_MODE="1", OMP_NUM_THREADS="1", VLLM_LOGGING_LEVEL="ERROR")
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model_dir)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "128", "--block-size", "32"]
        command += ["--dtype", "bfloat16", "--max-num-seqs", "16", "--enforce-eager", "--logprobs-mode", mode]
        command += ["--num-gpu-blocks-override", "4096"]  # of the cache's GiB: each reset goes through all blocks
        command += ["--weight-transfer-config", json.dumps({"backend": "trl_parity"})]
        self.log.write_text("")
        self.process = warm.Child(command, env=env, stdout=self.log, stderr=self.log)
        self.mode = mode
        for _ in range(1500):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                requests.get(f"{self.url}/health", timeout=5).raise_for_status()
                return
            except requests.RequestException:  # not up yet
                time.sleep(0.2)
        pytest.fail(f"the server did not come up: {self.log.read_text()[-2000:]}")

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)
        self.mode = None

    def freeze(self):
        """It takes connections and does not answer."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def client(self):
        from trl.generation.vllm_client import VLLMClient

        return VLLMClient(base_url=self.url)
