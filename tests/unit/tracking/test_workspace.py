"""The W&B workspace, made by the real client against a local server that keeps what it is sent."""

import inspect
import json

import pytest
import wandb
from support.wandb_server import Server

from trl_parity.cli import main
from trl_parity.metrics.scalars import SCALARS
from trl_parity.tracking.workspace import SECTIONS, Chart, Panel, Table, view_id, workspace

pytestmark = pytest.mark.slow_unit


def test_every_panel_shows_what_is_logged():
    from transformers import trainer as hf_trainer
    from trl.trainer import grpo_trainer

    source = inspect.getsource(grpo_trainer) + inspect.getsource(hf_trainer)
    names = [name for _, panels in SECTIONS for panel in panels if isinstance(panel, Panel) for name in panel.y]
    assert len(names) > 30
    for name in names:
        if name.startswith("parity/"):
            assert name.removeprefix("parity/") in SCALARS, name
        else:
            assert f'"{name}"' in source, name


def test_every_table_that_is_shown_is_one_that_is_logged():
    """What is logged: the same objects that go to every tracker."""
    from types import SimpleNamespace

    from support.windows import sums_of, verdict

    from trl_parity.tracking.sinks import RichLog, _objects

    rows = [{"position": 0, "rollout_logprob": -1.0, "trainer_logprob": -1.1, "log_ratio": -0.1, "entropy": None}]
    made = SimpleNamespace(Histogram=wandb.Histogram, Table=lambda columns, data: columns)
    logged = _objects(made, RichLog(1, sums_of(), rows, rows, [verdict(1)]))
    shown = [panel for _, panels in SECTIONS for panel in panels if isinstance(panel, Chart | Table)]
    assert {panel.table for panel in shown} == {"parity/verdicts", "parity/tokens", "parity/worst_tokens"}
    for panel in shown:
        wanted = {column for _, column in panel.fields} if isinstance(panel, Chart) else set()
        assert wanted <= set(logged[panel.table])


def test_the_sections_of_the_workspace():
    titles = {name: " ".join(getattr(p, "title", p.table if hasattr(p, "table") else "") for p in panels)
              for name, panels in SECTIONS}  # fmt: skip
    for section, words in {
        "Health": ("status", "streak", "excess", "limit", "verdicts"),
        "Drift": ("fp32 head, own head, noise floor", "p99", "ratio, raw", "effective sample size", "honesty"),
        "Policy": ("entropy: trainer, rollout", "entropy drift", "KL / entropy", "policy drift", "clip", "reward",
                   "gradient norm"),
        "Engine": ("cost",),
        "Tokens": ("log-ratio", "trainer against rollout", "worst_tokens"),
    }.items():  # fmt: skip
        for word in words:
            assert word in titles[section], (section, word)


def test_panels_are_drawn_over_the_trainers_step():
    spec = workspace("me", "mine")._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    bank = json.loads(spec)["section"]["panelBankConfig"]
    assert [s["name"] for s in bank["sections"]] == ["Health", "Drift", "Policy", "Engine", "Tokens"]
    drawn = [panel for section in bank["sections"] for panel in section["panels"]]
    assert len(drawn) == sum(len(panels) for _, panels in SECTIONS)
    plots = [panel["config"] for panel in drawn if panel["viewType"] == "Run History Line Plot"]
    assert {plot["xAxis"] for plot in plots} == {"train/global_step"}
    titles = [plot["chartTitle"] for plot in plots]
    assert len(titles) == len(set(titles)) == sum(isinstance(p, Panel) for _, panels in SECTIONS for p in panels)
    drift = next(plot for plot in plots if "train/parity/own_head/kl_k3" in plot["metrics"])
    assert drift["metrics"] == ["train/parity/kl_k3", "train/parity/own_head/kl_k3", "train/parity/floor/kl_k3"]
    assert drift["yLogScale"] is True


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        yield server
        if isinstance(
            wandb.run, wandb.Run
        ):  # a test failed: else the next run waits for this one, and it for a server
            wandb.finish()
            wandb.teardown()


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
    monkeypatch.setattr("trl_parity.tracking.workspace.SECTIONS", SECTIONS[:2])
    main(["panels", "--project", "mine"])
    assert server.upserts == len(server.views) == 2


def test_an_offline_run_makes_none(server, monkeypatch):
    from types import SimpleNamespace

    from trl_parity.tracking.sinks import WandbSink

    sink = WandbSink()
    for run in (None, SimpleNamespace(offline=True, project="mine", entity="me")):
        monkeypatch.setattr(wandb, "run", run)
        sink.make_panels()
    assert server.upserts == 0


def test_an_online_run_makes_them_once_and_sends_its_objects(server, monkeypatch, tmp_path, caplog):
    """The real client, online, from init to finish."""
    from support.windows import sums_of, verdict

    from trl_parity.tracking.sinks import RichLog, WandbSink
    from trl_parity.verdict import Status, Verdict

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # else a client that has begun keeps its server
    settings = wandb.Settings(x_disable_stats=True, console="off")
    run = wandb.init(project="mine", entity="me", mode="online", settings=settings, reinit="finish_previous")
    sink = WandbSink()
    sink.define_metrics()
    server.refuse = ("upsertView",)
    sink.make_panels()
    assert caplog.text.count("no W&B panels") == 1  # one warning, and the run goes on
    server.refuse = ()
    sink.make_panels()
    sink.make_panels()
    assert (server.upserts, list(server.views)) == (1, [f"nw-{view_id()}-v"])
    rows = [{"position": 0, "rollout_logprob": -1.0, "trainer_logprob": -1.1, "log_ratio": -0.1, "entropy": 0.5}]
    halt = Verdict(step=5, status=Status.HALT, streak=3, reason="kl_k3 0.5 > 0.1")
    for step, value in ((4, 0.5), (5, 0.2)):
        sink.log(step, {"parity/kl_k3": value, "parity/ess": 1 - value})
    sink.log_rich(RichLog(5, sums_of(), rows, rows, [verdict(4), halt]))
    sink.alert(verdict(4), "warned")
    sink.alert(halt, "halted")
    run.finish()
    wandb.teardown()
    assert [(a["severity"], a["title"], a["text"]) for a in server.alerts] == [
        ("WARN", "trl-parity OK at step 4", "warned"),
        ("ERROR", "trl-parity HALT at step 5", "halted"),
    ]
    assert [row["parity/kl_k3"] for row in server.history if "parity/kl_k3" in row] == [0.5, 0.2]
    [rich] = [row for row in server.history if "parity/tokens" in row]
    assert rich["train/global_step"] == 5
    assert rich["parity/log_ratio"]["_type"] == "histogram"
    assert {rich[f"parity/{name}"]["_type"] for name in ("tokens", "worst_tokens", "verdicts")} == {"table-file"}
    assert server.summary["parity/kl_k3"] == {"max": 0.5, "last": 0.2}
    assert server.summary["parity/ess"] == {"min": 0.5, "last": 0.8}
    assert server.summary["parity/verdict"] == "HALT at step 5: kl_k3 0.5 > 0.1"


def test_no_login_is_one_clear_line(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["panels", "--project", "mine"]) == 2
    told = capsys.readouterr().err
    assert "wandb login" in told
    assert "Traceback" not in told
