"""The W&B workspace, made by the real client against a local server that keeps what it is sent."""

import inspect
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl_parity.cli import main
from trl_parity.panels import SECTIONS, view_id, workspace
from trl_parity.scalars import SCALARS


def test_every_panel_shows_what_is_logged():
    from transformers import trainer as hf_trainer
    from trl.trainer import grpo_trainer

    source = inspect.getsource(grpo_trainer) + inspect.getsource(hf_trainer)
    names = [name for _, panels in SECTIONS for panel in panels for name in panel.y]
    assert len(names) > 30
    for name in names:
        if name.startswith("parity/"):
            assert name.removeprefix("parity/") in SCALARS, name
        else:
            assert f'"{name}"' in source, name


def test_panels_are_drawn_over_the_trainers_step():
    spec = workspace("me", "mine")._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    bank = json.loads(spec)["section"]["panelBankConfig"]
    assert [s["name"] for s in bank["sections"]] == ["Health", "Drift", "Policy", "Engine", "Tokens"]
    plots = [panel["config"] for section in bank["sections"][:-1] for panel in section["panels"]]
    assert {plot["xAxis"] for plot in plots} == {"train/global_step"}
    titles = [plot["chartTitle"] for plot in plots]
    assert len(titles) == len(set(titles)) == sum(len(panels) for _, panels in SECTIONS)
    drift = next(plot for plot in plots if "train/parity/own_head/kl_k3" in plot["metrics"])
    assert drift["metrics"] == ["train/parity/kl_k3", "train/parity/own_head/kl_k3", "train/parity/floor/kl_k3"]
    assert drift["yLogScale"] is True


class Server(ThreadingHTTPServer):
    """Answers the GraphQL operations behind the view, and keeps the views."""

    def __init__(self):
        self.views, self.upserts = {}, 0
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        query, variables = request["query"], request.get("variables") or {}
        if "upsertView" in query:
            self.server.upserts += 1
            name = variables["name"]
            self.server.views[name] = {k: variables[k] for k in ("displayName", "spec", "projectName", "entityName")}
            data = {"upsertView": {"view": {"id": "Vmlldzox", "name": name}, "inserted": True}}
        elif "allViews" in query:
            view = self.server.views.get(variables["viewName"])
            edges = [] if view is None else [{"node": {"id": "Vmlldzox", **view}}]
            data = {"project": {"allViews": {"edges": edges}}}
        else:
            viewer = {"id": "1", "entity": "me", "username": "me", "admin": False, "flags": "{}", "email": "a@b.c"}
            viewer |= {"teams": {"edges": []}, "name": "me"}
            data = {"viewer": viewer, "serverInfo": {"features": []}}
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield server
    server.shutdown()


def test_the_view_is_made_once_and_never_overwrites_a_persons_edits(server, capsys):
    assert main(["panels", "--project", "mine"]) == 0
    [(name, view)] = server.views.items()
    assert name == f"nw-{view_id()}-v"
    assert (view["displayName"], view["entityName"], view["projectName"]) == ("trl-parity", "me", "mine")
    assert "train/parity/breaker/status" in view["spec"]
    out = capsys.readouterr().out
    assert "made: " in out
    assert f"/me/mine?nw={view_id()}" in out

    view["displayName"] = "edited by a person"
    assert main(["panels", "--project", "mine", "--entity", "me"]) == 0
    assert "already there" in capsys.readouterr().out
    assert server.upserts == 1
    assert view["displayName"] == "edited by a person"


def test_other_content_is_another_view(server, monkeypatch):
    main(["panels", "--project", "mine"])
    monkeypatch.setattr("trl_parity.panels.SECTIONS", SECTIONS[:2])
    main(["panels", "--project", "mine"])
    assert server.upserts == len(server.views) == 2


def test_an_online_run_can_make_them_and_an_offline_one_does_not(server, monkeypatch, caplog):
    from types import SimpleNamespace

    import wandb

    from trl_parity.sinks import WandbSink

    sink = WandbSink()
    for run in (None, SimpleNamespace(offline=True, project="mine", entity="me")):
        monkeypatch.setattr(wandb, "run", run)
        sink.make_panels()
    assert server.upserts == 0
    monkeypatch.setattr(wandb, "run", SimpleNamespace(offline=False, project="mine", entity="me"))
    sink.make_panels()
    sink.make_panels()
    assert server.upserts == 1
    assert "W&B panels are there" in caplog.text


def test_no_login_is_one_clear_line(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["panels", "--project", "mine"]) == 2
    told = capsys.readouterr().err
    assert "wandb login" in told
    assert "Traceback" not in told
