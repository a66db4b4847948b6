"""Weights through files: from the trainer's half to the server's, over HTTP."""

import json
import tempfile
from types import SimpleNamespace

import pytest
import torch
from support.peer import Peer, head

pytestmark = pytest.mark.slow_unit

INFO = {"vllm_config": {"weight_transfer_config": {"backend": "trl_parity"}}}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_PARITY_WEIGHTS_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def served(place):
    """vLLM's half on a model that keeps what it loads, behind HTTP: (address, what was loaded, the engine)."""
    from trl_parity.engine.weight_transfer import FileWeightTransferEngine

    loaded = {}
    model = torch.nn.Module()
    model.load_weights = lambda named: loaded.update(named)
    config = SimpleNamespace(parallel_config=None, model_config=None)
    engine = FileWeightTransferEngine(None, config, torch.device("cpu"), model)

    def answer(request):
        start, _, body = request.partition("\r\n\r\n")
        path = start.split()[1]
        try:
            if path == "/init_weight_transfer_engine":
                engine.init_transfer_engine(engine.parse_init_info(json.loads(body)["init_info"]))
            elif path == "/update_weights":
                engine.update_weights(json.loads(body)["update_info"])
            said, status = json.dumps(INFO if "info" in path else {}), "200 OK"
        except Exception as e:
            said, status = str(e), "500 Internal Server Error"
        return [head(status=status, length=len(said)) + said.encode()]

    server = Peer(answer)
    yield SimpleNamespace(url=server.url, loaded=loaded, engine=engine, requests=server.requests)
    server.close()


def transfer_to(served, **more):
    from trl_parity.engine.weight_transfer import FileTransfer

    return FileTransfer(served.url, timeout=30.0, **more)


def test_weights_arrive_and_no_request_names_a_path(served, place):
    transfer = transfer_to(served, file_bytes=100)
    transfer.init_weight_transfer()
    [folder] = place.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    named = [(f"w{i}", torch.randn(10)) for i in range(5)]
    transfer.send_weights(named)
    assert all(torch.equal(served.loaded[name], tensor) for name, tensor in named)
    assert not list(folder.iterdir())
    assert not any(str(place) in request for request in served.requests)
    transfer.destroy()
    assert not list(place.iterdir())


def test_a_server_that_looks_elsewhere_is_refused_at_the_start(served, place, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    with pytest.raises(RuntimeError, match=f"start both with TRL_PARITY_WEIGHTS_DIR={other}"):
        transfer_to(served, directory=str(other)).init_weight_transfer()
    assert not list(other.iterdir())
    monkeypatch.delenv("TRL_PARITY_WEIGHTS_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    transfer = transfer_to(served)
    transfer.init_weight_transfer()
    assert [path.name.startswith("trl-parity-weights-") for path in other.iterdir()] == [True]
    transfer.destroy()
