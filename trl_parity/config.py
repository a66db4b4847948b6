"""Settings as frozen data: ``ParityConfig`` and its ``Rule``s. Imports no torch, vllm or wandb."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError

__all__ = ["DEFAULT_RULES", "ParityConfig", "Rule"]

ACTIONS = ("log", "skip_update", "stop", "raise")
TRUNCATION = ("replay", "ignore")
EVAL_BATCHES = ("separate", "skip")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One limit on one statistic of a window.

    A window breaches the rule when ``stat > limit`` (``stat < limit`` with ``below=True``). A non-finite value of
    a statistic that was measured breaches too: it can't be shown to be within the limit. A statistic that was not
    measured (absent, ``None``) never breaches.
    """

    stat: str
    limit: float
    consecutive: int | None = None  # breached windows in a row that halt; None: ParityConfig.consecutive
    immediate: bool = False  # halt at the first breached window
    below: bool = False  # breach below the limit instead of above
    warn_only: bool = False  # the window becomes WARN; streak and halt are untouched

    def __post_init__(self) -> None:
        from .scalars import SCALARS

        if self.stat not in SCALARS:
            raise ConfigError(
                f"rule on unknown statistic {self.stat!r}{_nearest(self.stat, SCALARS)}. Expected one of: "
                f"{', '.join(SCALARS)}."
            )
        if isinstance(self.limit, bool) or not isinstance(self.limit, int | float) or self.limit != self.limit:
            raise ConfigError(f"rule {self.stat!r}: limit is {self.limit!r}. Expected a number.")
        if self.consecutive is not None and (not isinstance(self.consecutive, int) or self.consecutive < 1):
            raise ConfigError(
                f"rule {self.stat!r}: consecutive is {self.consecutive!r}. Expected a whole number >= 1 or null."
            )

    def breached(self, value: float | None) -> bool:
        """Whether ``value`` (``None``: not measured) is outside the limit."""
        if value is None:
            return False
        return not (value >= self.limit if self.below else value <= self.limit)


# Provisional absolute limits: clean floors span three orders of magnitude between models (mean |log-ratio| 1.5e-3
# nats on a tiny fp32/bf16 pair, 0.025 to 0.05 on a 135M model in bf16), faults seen so far start near 0.08. They
# sit above every clean run measured and below those faults. Tighten them to your own run's clean values.
DEFAULT_RULES: tuple[tuple[str, float], ...] = (
    ("kl_k3", 0.01),
    ("logp_abs_diff/mean", 0.06),
    ("honesty_gap", 0.01),
    ("nonfinite_rate", 0.01),
    ("confident_disagreement", 0.01),
)


@dataclass(frozen=True)
class ParityConfig:
    """Settings of :class:`~trl_parity.ParityCallback`; fields work as YAML keys and as TrlParser arguments."""

    every_n_steps: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps per window: every rollout batch is measured, and each window is reduced over "
            "all ranks, judged and logged once. 1 judges every batch before it is learned from."
        },
    )
    action: str = field(
        default="stop",
        metadata={
            "help": "What a HALT verdict does. 'log': nothing but log. 'skip_update': keep the condemned batch's "
            "gradient from the weights and go on. 'stop': the same, then save a checkpoint and end train() cleanly. "
            "'raise': raise ParityHalt before the batch is learned from.",
            "choices": list(ACTIONS),
        },
    )
    consecutive: int = field(
        default=3,
        metadata={"help": "Breached windows in a row that halt, for rules that do not set their own number."},
    )
    rules: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Limits by statistic, laid over the defaults, e.g. {'kl_k3': {'limit': 0.001}, 'ess': "
            "{'limit': 0.5, 'below': true}}; a bare number is a limit, null or false drops a default rule. On a "
            "command line: JSON."
        },
    )
    truncation: str = field(
        default="replay",
        metadata={
            "help": "'replay': apply the engine's top-k, top-p, min-p and penalties to the trainer's logits before "
            "comparing, and report their effect apart (truncation/*). 'ignore': compare with the trainer's plain "
            "policy, so that truncation counts as drift.",
            "choices": list(TRUNCATION),
        },
    )
    eval_batches: str = field(
        default="separate",
        metadata={
            "help": "'separate': measure evaluation rollouts too and log them under eval/parity/*, never mixed into "
            "training windows and never judged. 'skip': leave them alone.",
            "choices": list(EVAL_BATCHES),
        },
    )
    token_budget: int = field(
        default=8192,
        metadata={
            "help": "Tokens per rollout batch and rank (prompts and padding included) of the callback's own forward "
            "pass, run only where TRL makes none (vllm_importance_sampling_correction=False)."
        },
    )
    chunk_mib: int = field(
        default=64,
        metadata={"help": "Upper bound in MiB of the fp32 head's temporary memory (logits tile and all)."},
    )
    bootstrap_samples: int = field(
        default=200, metadata={"help": "Bootstrap resamples of sequences behind the honesty interval."}
    )
    halt_on_error: bool = field(
        default=False,
        metadata={
            "help": "Whether windows that could not be measured (ERROR) may halt the run by themselves. By default "
            "they keep a streak growing but a halt needs a measured breach in it."
        },
    )
    rich_every_n_windows: int = field(
        default=10,
        metadata={
            "help": "Every how many windows the log-ratio histogram and the worst-token table go to W&B (and at each "
            "change to BREACH or HALT). 0: never."
        },
    )
    worst_tokens: int = field(default=20, metadata={"help": "Rows of the worst-token table."})
    redact_text: bool = field(
        default=False,
        metadata={"help": "Keep token ids and text out of everything that is logged or written."},
    )
    parity_dir: str | None = field(
        default=None, metadata={"help": "Where metrics.jsonl goes. Default: <output_dir>/parity."}
    )

    def __post_init__(self) -> None:
        for name, allowed in (
            ("action", ACTIONS),
            ("truncation", TRUNCATION),
            ("eval_batches", EVAL_BATCHES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"{name} is {value!r}{_nearest(str(value), allowed)}. Expected one of: {', '.join(allowed)}."
                )
        for name, least in (
            ("every_n_steps", 1),
            ("consecutive", 1),
            ("token_budget", 1),
            ("chunk_mib", 1),
            ("bootstrap_samples", 2),
            ("rich_every_n_windows", 0),
            ("worst_tokens", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}. Expected a whole number >= {least}.")
        self.resolved_rules()  # a wrong rule fails here, before any training

    def resolved_rules(self) -> tuple[Rule, ...]:
        """The default rules with ``rules`` laid over them, each with its ``consecutive`` filled in."""
        merged = {stat: Rule(stat=stat, limit=limit) for stat, limit in DEFAULT_RULES}
        for stat, spec in _as_mapping(self.rules).items():
            if spec is None or spec is False:
                if stat not in merged:
                    raise ConfigError(
                        f"rules drops {stat!r}, which is no default rule{_nearest(stat, merged)}. Expected one of: "
                        f"{', '.join(merged)}."
                    )
                del merged[stat]
                continue
            keys = dict(spec) if isinstance(spec, Mapping) else {"limit": spec}
            _refuse_unknown(keys, [f.name for f in fields(Rule) if f.name != "stat"], f"rules.{stat}")
            if stat in merged:
                merged[stat] = replace(merged[stat], **keys)
            elif "limit" not in keys:
                raise ConfigError(f"rules.{stat} sets {sorted(keys)} but no limit. Add one: {{'limit': 0.01}}.")
            else:
                merged[stat] = Rule(stat=stat, **keys)
        return tuple(
            rule if rule.consecutive is not None else replace(rule, consecutive=self.consecutive)
            for rule in merged.values()
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "config") -> ParityConfig:
        """Build from a mapping; unknown keys raise :class:`ConfigError` naming the nearest known one."""
        _refuse_unknown(values, [f.name for f in fields(cls)], where)
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> ParityConfig:
        """Read a YAML mapping of field names. Unknown keys, wrong values and broken YAML raise ``ConfigError``."""
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {e.strerror}. Expected a YAML file of settings.") from e
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path} is not valid YAML: {e}") from e
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{path} holds a {type(values).__name__}. Expected a mapping such as 'every_n_steps: 1'."
            )
        return cls.from_mapping(values, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values of all fields, as JSON and YAML take them."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        return out | {"rules": _as_mapping(self.rules) or None}


def _as_mapping(rules: Any) -> dict[str, Any]:
    if isinstance(rules, str):
        try:
            rules = json.loads(rules)
        except json.JSONDecodeError as e:
            raise ConfigError(f"rules is not valid JSON ({e}): {rules!r}.") from e
    if rules is None:
        return {}
    if isinstance(rules, Mapping):
        return dict(rules)
    if isinstance(rules, list | tuple) and all(isinstance(rule, Rule) for rule in rules):
        return {
            rule.stat: {
                f.name: value
                for f in fields(Rule)
                if f.name != "stat" and (value := getattr(rule, f.name)) != f.default
            }
            for rule in rules
        }
    raise ConfigError(
        f"rules is a {type(rules).__name__}: {rules!r}. Expected a mapping of statistic to limit, or Rule objects."
    )


def _refuse_unknown(values: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key {key!r}{_nearest(str(key), known)}. Known keys: {', '.join(known)}."
            )


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
