"""A ready-made W&B workspace: ``trl-parity panels --project P`` makes it, once per version of its content.

The view's name is a hash of what is drawn: the same content is found again and left as it is, edits by a person
included; other content is another view. Nothing here is imported unless it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlencode

from ..errors import ConfigError

__all__ = ["SECTIONS", "Chart", "Panel", "Table", "create", "view_id", "workspace"]

NAME = "trl-parity"

_STEP = "train/global_step"


@dataclass(frozen=True)
class Panel:
    """One line plot over ``train/global_step``. ``y``: scalar names, ``parity/`` ones as in SCALARS."""

    title: str
    y: tuple[str, ...]
    log: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def metrics(self) -> list[str]:
        """Names as the trainer's reporter logs them."""
        return [f"train/{name}" for name in self.y]


@dataclass(frozen=True)
class Chart:
    """One of W&B's own charts of a table that is logged."""

    title: str
    table: str
    preset: str
    fields: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """A table that is logged."""

    table: str


def _parity(title: str, *names: str, **kwargs: Any) -> Panel:
    return Panel(title, tuple(f"parity/{name}" for name in names), **kwargs)


SECTIONS: tuple[tuple[str, tuple[Panel | Chart | Table, ...]], ...] = (
    (
        "Health",
        (
            _parity("status: 0 OK, 1 WARN, 2 BREACH, 3 HALT", "breaker/status", low=-3.2, high=3.2),
            _parity("breached windows: streak, and remembered", "breaker/streak", "breaker/level", low=0),
            _parity("k3 KL: excess over the noise floor, and its limit", "excess/kl_k3", "limit/kl_k3"),
            _parity("mean |log-ratio|: excess and limit", "excess/logp_abs_diff/mean", "limit/logp_abs_diff/mean"),
            _parity("evidence over the run, log10: 4 decides", "evidence/honesty", "evidence/drift",
                    "evidence/entropy", "evidence/change"),
            Table("parity/verdicts"),
        ),
    ),
    (
        "Drift",
        (
            _parity("k3 KL: fp32 head, own head, noise floor", "kl_k3", "own_head/kl_k3", "floor/kl_k3", log=True),
            _parity("|log-ratio|: mean, p99, max, floor", "logp_abs_diff/mean", "logp_abs_diff/p99",
                    "logp_abs_diff/max", "floor/logp_abs_diff/mean", log=True),
            _parity("importance ratio, raw: p01, median, p99", "ratio/p01", "ratio/p50", "ratio/p99"),
            _parity("share of ratios outside [0.9, 1.1]", "ratio/out_of_band", "floor/ratio/out_of_band", low=0),
            _parity("effective sample size", "ess", "seq/ess", high=1),
            _parity("90 % of the k3: share of sequences, of prompts", "concentration/sequences",
                    "concentration/prompts", low=0, high=1),
            _parity("PSIS k-hat of sequences, and its limit", "seq/khat", "seq/khat_limit"),
            _parity("one rank: lower bounds of its k3 and mean |log-ratio|", "replica/kl_k3",
                    "replica/logp_abs_diff/mean", log=True),
            _parity("honesty: mean ratio, 99 % interval holds 1", "honesty_low", "honesty", "honesty_high"),
        ),
    ),
    (
        "Policy",
        (
            _parity("entropy: trainer, rollout", "entropy/trainer", "entropy/rollout", low=0),
            _parity("entropy drift and 99 % interval", "entropy/drift_low", "entropy/drift", "entropy/drift_high"),
            _parity("k3 KL / entropy", "kl_over_entropy", log=True),
            _parity("policy drift, k3 KL", "policy_drift/kl_k3", log=True),
            _parity("reference: frozen weights moved, layers merged, k3 at the start", "reference/base_moved",
                    "reference/merged", "reference/start_kl_k3", low=0),
            _parity("teacher's server: temperature gap, missing, foreign ids", "teacher/temperature_gap",
                    "teacher/missing", "teacher/foreign", low=0),
            _parity("teacher's server: probability given for a place, at most 1", "teacher/mass", "teacher/mass_max",
                    low=0),
            _parity("completions of one prompt: equal pairs, duplicates, probability", "completions/equal_pairs",
                    "completions/duplicates", "completions/probability", low=0, high=1),
            _parity("stopped completions masked as truncated", "completions/stopped_but_masked", low=0, high=1),
            Panel("clip ratio", ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"), low=0),
            Panel("reward", ("reward", "reward_std")),
            Panel("gradient norm", ("grad_norm",), log=True),
        ),
    ),
    (
        "Engine",
        (
            _parity("temperature: engine, trainer", "temperature/engine", "temperature/trainer", low=0),
            _parity("truncation: probability kept", "truncation/kept_mass", high=1),
            _parity("prefix cache: prompt tokens read from it", "engine/prefix_cache_hit_rate", low=0, high=1),
            _parity("KV cache: largest share in use", "engine/kv_cache_usage", low=0, high=1),
            _parity("lag, optimizer steps", "lag", low=0),
            _parity("k3 KL by lag (async): at 0, and staleness", "kl_k3", "lag/1/kl_k3", "lag/2/kl_k3",
                    "lag/3_4/kl_k3", "lag/5_up/kl_k3", log=True),
            _parity("cost of trl-parity, share of time", "cost/share", "cost/floor_share", low=0),
        ),
    ),
    (
        "Tokens",
        (
            Chart("log-ratio of sampled tokens", "parity/tokens", "wandb/histogram/v0", (("value", "log_ratio"),)),
            Chart("trainer against rollout log-prob", "parity/tokens", "wandb/scatter/v0",
                  (("x", "rollout_logprob"), ("y", "trainer_logprob"))),
            Table("parity/worst_tokens"),
        ),
    ),
)  # fmt: skip


def view_id() -> str:
    """The id of the view with this content."""
    content = [(name, [(type(panel).__name__, asdict(panel)) for panel in panels]) for name, panels in SECTIONS]
    return "trlparity" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:10]


def workspace(entity: str, project: str) -> Any:
    """The workspace as wandb-workspaces' object; needs no server."""
    ws, wr = _packages()
    sections = [
        ws.Section(name=name, panels=[_drawn(wr, panel) for panel in panels], is_open=True)
        for name, panels in SECTIONS
    ]
    settings = ws.WorkspaceSettings(x_axis=_STEP)
    view = ws.Workspace(entity=entity, project=project, name=NAME, sections=sections, settings=settings)
    view._internal_name = f"nw-{view_id()}-v"
    return view


def _drawn(wr: Any, panel: Panel | Chart | Table) -> Any:
    if isinstance(panel, Table):
        return wr.WeavePanelSummaryTable(table_name=panel.table)
    if isinstance(panel, Chart):
        query, strings = {"summaryTable": {"tableKey": panel.table}}, {"title": panel.title}
        return wr.CustomChart(
            query=query, chart_name=panel.preset, chart_fields=dict(panel.fields), chart_strings=strings
        )
    return wr.LinePlot(
        title=panel.title, x=_STEP, y=panel.metrics, log_y=panel.log or None, range_y=(panel.low, panel.high)
    )


def create(project: str, entity: str | None = None) -> tuple[str, bool]:
    """Make the view unless it is there; its address, and whether it was made now.

    Raises ConfigError without a login, without wandb-workspaces, or when W&B refuses.
    """
    ws, _ = _packages()
    import wandb

    try:
        entity = entity or wandb.Api().default_entity
    except Exception as e:  # whatever the client raises without a login
        raise ConfigError(f"W&B does not answer ({e}). Log in with `wandb login`, or give --entity.") from e
    if not entity:
        raise ConfigError("no W&B entity is known. Log in with `wandb login`, or give --entity.")
    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").replace("://api.", "://")
    url = f"{base}/{entity}/{project}?{urlencode({'nw': view_id()})}"
    try:
        ws.Workspace.from_url(url)
        return url, False
    except ValueError as e:
        if "not found in project" not in str(e):
            raise ConfigError(f"W&B: {e}. The project comes into being with its first online run.") from e
    except Exception as e:
        raise ConfigError(f"W&B could not be asked for the view: {type(e).__name__}: {e}.") from e
    try:
        workspace(entity, project).save()
    except Exception as e:
        raise ConfigError(f"W&B did not take the view: {type(e).__name__}: {e}.") from e
    return url, True


def _packages() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as e:
        raise ConfigError(f"panels need wandb-workspaces ({e}). Run: pip install 'trl-parity[wandb]'.") from e
    return ws, wr
