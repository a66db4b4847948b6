"""A vLLM server that takes connections and does not answer: what it costs a run, and how it comes back."""

import importlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from trl_parity.engine.cache_stats import server_counters
from trl_parity.engine.handle import EngineHandle, SettingsHistory
from trl_parity.trainers.capture import Capture

TIMEOUT = 0.5

importlib.import_module("requests")  # its import is no wait for a server


class Server:
    """Takes every connection; answers as many as ``answers`` says with its settings, the rest never."""

    def __init__(self, answers=0, port=0):
        self.answers, self.connections = answers, []
        self.instance, self.dtype = "first", "bfloat16"
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections.append(connection)  # kept open
            if len(self.connections) <= self.answers:
                connection.recv(65536)
                self._answer(connection)

    def _answer(self, connection):
        model = {"dtype": self.dtype, "max_model_len": 128, "logprobs_mode": "processed_logprobs"}
        config = {"model_config": model, "cache_config": {"enable_prefix_caching": True}, "instance_id": self.instance}
        body = json.dumps({"vllm_config": config}).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + body)
        connection.close()

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def generation_of(port):
    client = SimpleNamespace(base_url=f"http://127.0.0.1:{port}", model="m")
    return SimpleNamespace(mode="server", vllm_client=client)


class Batch(Capture):
    """A generation batch of a run, as far as its engine goes."""

    rollout = rewards = run_policy = log = None

    def __init__(self, handle, generation):
        super().__init__(SimpleNamespace(vllm_generation=generation), SimpleNamespace(engine_handle=handle), True)


def test_a_server_that_never_answers_costs_a_run_one_timeout(server, caplog):
    handle, generation, history = EngineHandle(TIMEOUT), generation_of(server.port), SettingsHistory()
    start = time.perf_counter()
    for _ in range(6):  # windows
        capture = Batch(handle, generation)
        history.compare(capture.refreshed_engine())
        for _ in ("lint", "engine arguments", "floor", "diagnosis", "incident"):
            assert capture.engine is None
    assert TIMEOUT <= time.perf_counter() - start < 2 * TIMEOUT
    assert len(server.connections) == 1
    [told] = [r.message for r in caplog.records]
    assert told.startswith(
        f"the vLLM server does not tell its settings: no answer from http://127.0.0.1:{server.port}"
    )
    assert told.endswith("It is not asked again in this run")
    assert handle.absence


@pytest.mark.slow_unit
def test_a_new_run_asks_again(server):
    generation = generation_of(server.port)
    for _ in range(2):
        assert EngineHandle(TIMEOUT).get(generation) is None
    assert len(server.connections) == 2


@pytest.mark.slow_unit
def test_one_that_falls_silent_later_is_asked_once_more_for_a_sign_of_life(server, caplog):
    server.answers = 1
    handle, generation = EngineHandle(TIMEOUT), generation_of(server.port)
    engine = handle.get(generation)
    assert engine.max_model_len == 128
    start = time.perf_counter()
    for _ in range(2):
        with pytest.raises(ConnectionError, match="/v1/completions within"):
            engine.rescore([[1, 2, 3]])
    assert handle.get(generation) is None
    for _ in range(5):
        assert handle.refreshed(generation) is None
    assert time.perf_counter() - start < 3 * TIMEOUT
    assert len(server.connections) == 3  # settings, scoring, sign of life
    assert ["not asked again" in r.message for r in caplog.records] == [False, True]


@pytest.mark.slow_unit
def test_one_that_was_only_slow_is_the_engine_again_at_the_next_window(server):
    server.answers = 1
    handle, generation = EngineHandle(TIMEOUT), generation_of(server.port)
    engine = handle.get(generation)
    with pytest.raises(ConnectionError):
        engine.rescore([[1, 2, 3]])
    assert handle.get(generation) is None
    server.answers = 10
    assert handle.refreshed(generation) is engine
    assert handle.get(generation) is engine
    assert handle.absence == ""


def test_a_server_that_can_not_be_reached_is_found_when_it_is_there(caplog):
    gone = Server()
    port = gone.port
    gone.close()
    handle, generation = EngineHandle(TIMEOUT), generation_of(port)
    assert handle.get(generation) is None
    assert handle.refreshed(generation) is None
    assert len(caplog.records) == 1
    server = Server(answers=10, port=port)
    assert handle.get(generation) is None  # not asked between windows
    assert server.connections == []
    assert handle.refreshed(generation).max_model_len == 128
    server.close()


def test_a_restarted_server_is_noticed_through_the_same_handle(server, caplog):
    server.answers = 10
    handle, generation, history = EngineHandle(TIMEOUT), generation_of(server.port), SettingsHistory()
    engine = handle.get(generation)
    history.compare(handle.refreshed(generation))
    server.instance, server.dtype = "second", "float16"
    history.compare(handle.refreshed(generation))
    assert handle.get(generation) is engine
    assert history.restarts == 1
    [told] = [r.message for r in caplog.records]
    assert "was restarted" in told
    assert "engine_dtype was bfloat16, is float16" in told
    assert len(server.connections) == 3  # one short request a window


def test_a_rank_that_talks_to_no_server_asks_nothing(caplog):
    generation = SimpleNamespace(mode="server", vllm_client=None)
    handle = EngineHandle(TIMEOUT)
    assert handle.get(generation) is handle.refreshed(generation) is None
    assert not caplog.records


@pytest.mark.slow_unit
def test_its_counters_are_asked_once(server, caplog):
    client = type("Client", (), {"base_url": f"http://127.0.0.1:{server.port}"})()
    start = time.perf_counter()
    for _ in range(4):
        assert server_counters(client, TIMEOUT) is None
    assert time.perf_counter() - start < 2 * TIMEOUT
    assert len(server.connections) == 1
    assert len(caplog.records) == 1
