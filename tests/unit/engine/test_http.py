"""Requests to a server that answers slowly, without end, or with somebody else's address: each bounded and said."""

import importlib
import json
import threading
import time

import pytest
from support.peer import Peer, head

from trl_parity.engine import http
from trl_parity.engine.http import API_KEY, NoAnswer, ServerAPI

importlib.import_module("requests")  # its import is no wait for a server

BODY = json.dumps({"fine": True}).encode()


@pytest.fixture
def peer():
    made = []

    def make(answer, pause=0.0):
        made.append(Peer(answer, pause))
        return made[-1]

    yield make
    for one in made:
        one.close()


def drip(whole):
    return lambda request: (whole[i : i + 1] for i in range(len(whole)))


@pytest.mark.parametrize(
    "whole", [head(length=999) + b" " * 200, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50], ids=["body", "head"]
)
def test_an_answer_that_comes_byte_by_byte_ends_with_the_timeout(peer, whole):
    server = peer(drip(whole + BODY), pause=0.05)  # each byte in time, all of them in 10 seconds
    start = time.perf_counter()
    with pytest.raises(NoAnswer, match=r"no answer from http://127\.0\.0\.1:\d+/x within 0\.2 s"):
        ServerAPI(server.url, 0.2).json("get", "/x")
    assert time.perf_counter() - start < 2


def test_a_body_that_stops_is_no_answer_either(peer):
    hold = threading.Event()

    def answer(request):
        yield head(length=1000) + b"half"
        hold.wait(5)

    try:
        with pytest.raises(NoAnswer):  # what a run gives a server up for: not tried at each window
            ServerAPI(peer(answer).url, 0.2).text("get", "/x")
    finally:
        hold.set()


@pytest.mark.slow_unit
def test_requests_given_up_are_bounded_in_number(peer):
    server = peer(drip(head(length=60 + len(BODY)) + b" " * 60 + BODY), pause=0.05)
    api, before = ServerAPI(server.url, 0.05), threading.active_count()

    def ask():
        with pytest.raises(NoAnswer):
            api.text("get", "/x")

    asked = [threading.Thread(target=ask) for _ in range(50)]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join(10)
    named = [t for t in threading.enumerate() if t.name == "trl-parity-request"]
    assert len(named) <= http._AT_ONCE
    assert threading.active_count() >= before


def test_an_answer_without_end_is_cut(peer, monkeypatch):
    monkeypatch.setattr(http, "_LARGEST", 1 << 20)
    sent = []

    def answer(request):
        yield head(length=1 << 40)
        while True:
            sent.append(1 << 16)
            yield b"x" * (1 << 16)

    with pytest.raises(RuntimeError, match="/x of the vLLM server answered more than 1 MiB"):
        ServerAPI(peer(answer).url, 30.0).json("get", "/x?y=1")
    assert sum(sent) < 64 << 20  # read no further: what is under way, the sockets hold


def test_a_packed_answer_and_another_address_are_refused(peer):
    packed = peer(lambda request: [head("Content-Encoding: gzip", length=len(BODY)) + BODY])
    with pytest.raises(RuntimeError, match="answered 'gzip'"):
        ServerAPI(packed.url, 5.0).json("get", "/x")
    assert "Accept-Encoding: identity" in packed.requests[0]
    goal = peer(lambda request: [head(length=len(BODY)) + BODY])
    sent_on = peer(lambda request: [head(f"Location: {goal.url}/x", status="307 Temporary Redirect")])
    with pytest.raises(RuntimeError, match="answered 307"):
        ServerAPI(sent_on.url, 5.0).json("get", "/x")
    assert goal.requests == []


def test_the_key_is_sent_and_never_said(peer, monkeypatch):
    monkeypatch.setenv(API_KEY, "abcdef123")
    server = peer(lambda request: [head(length=len(BODY)) + BODY])
    assert ServerAPI(server.url, 5.0).json("get", "/x") == {"fine": True}
    assert "Authorization: Bearer abcdef123" in server.requests[0]
    echo = peer(lambda request: [head(status="500 Oops", length=len(request)) + request.encode()])
    with pytest.raises(RuntimeError) as raised:
        ServerAPI(echo.url, 5.0).json("get", "/x")
    assert "Authorization" in str(raised.value)
    assert "abcdef123" not in str(raised.value)


def test_user_and_password_of_an_address_are_sent_and_never_said(peer, monkeypatch):
    monkeypatch.setenv(API_KEY, "abcdef123")
    server = peer(lambda request: [head(status="404 Not Found")])
    url = server.url.replace("//", "//mine:hunter2@")
    with pytest.raises(RuntimeError) as raised:
        ServerAPI(url, 5.0).json("get", "/server_info")
    assert "Authorization: Basic bWluZTpodW50ZXIy" in server.requests[0]
    server.close()
    with pytest.raises(ConnectionError) as gone:
        ServerAPI(url, 5.0).json("get", "/server_info")
    for error in (raised, gone):
        assert "//***@127.0.0.1" in str(error.value)
        assert "hunter2" not in str(error.value)
