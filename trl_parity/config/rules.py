"""What a window is judged by: rules, the default ones, and how settings are laid over them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import ConfigError
from .reading import from_json

__all__ = [
    "DEFAULT_RULES",
    "EVIDENCE_EFFECTS",
    "Rule",
    "as_mapping",
    "nearest",
    "refuse_unknown",
    "rules_over_defaults",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One limit on one statistic of a window.

    With ``k``, the rule looks at the excess over the noise floor: breach when
    ``excess > max(limit, (k - 1) * floor)``, that is when the statistic is above both floor + limit and k x floor;
    or when the statistic is above ``ceiling``, whatever the floor; where no floor is known, above ``absolute``. (Of
    ``ess``, which falls with noise, it is 1 - ess that is meant.) Without ``k`` it looks at the statistic alone:
    breach when ``stat > limit`` (``stat < limit`` with ``below=True``).

    Unless ``immediate``, what is looked at is the ``trimmed/*`` form of the statistic, where there is one: a single
    token of any size can't breach. A non-finite value of a statistic that was measured breaches: it can't be shown
    to be within the limit. A statistic that was not measured (absent, ``None``) never breaches.
    """

    stat: str
    limit: float
    k: float | None = None  # multiple of the noise floor; None: an absolute limit
    ceiling: float | None = None  # with k: the statistic breaches above it whatever the floor
    absolute: float | None = None  # with k: the limit on the statistic where no floor is known
    warn: float = 0.5  # WARN from this share of the limit on; below it a streak ends (hysteresis)
    consecutive: int | None = None  # breached windows in a row that halt; None: ParityConfig.consecutive
    immediate: bool = False  # halt at the first breached window
    below: bool = False  # breach below the limit instead of above
    warn_only: bool = False  # the window becomes WARN; streak and halt are untouched

    def __post_init__(self) -> None:
        from ..metrics.scalars import FLOORED, SCALARS

        if self.stat not in SCALARS:
            raise ConfigError(
                f"rule on unknown statistic {self.stat!r}{nearest(self.stat, SCALARS)}. Expected one of: "
                f"{', '.join(SCALARS)}."
            )
        self._number("limit", self.limit, None)
        if self.k is not None:
            self._number("k", self.k, 1.0)
            if self.stat.removeprefix("replica/") not in FLOORED:
                raise ConfigError(
                    f"rule {self.stat!r} sets k={self.k:g}, but that statistic has no noise floor. Expected k only "
                    f"for: {', '.join(FLOORED)}."
                )
            if self.below:
                raise ConfigError(f"rule {self.stat!r} sets both k and below. An excess over a floor is too high.")
        for name in ("ceiling", "absolute"):
            if getattr(self, name) is not None:
                self._number(name, getattr(self, name), 0.0)
                if self.k is None:
                    raise ConfigError(f"rule {self.stat!r} sets {name} but no k. Set limit alone.")
        self._number("warn", self.warn, 0.0)
        if self.warn > 1:
            raise ConfigError(f"rule {self.stat!r}: warn is {self.warn!r}. Expected a share of the limit, 0 to 1.")
        if self.consecutive is not None and (not isinstance(self.consecutive, int) or self.consecutive < 1):
            raise ConfigError(
                f"rule {self.stat!r}: consecutive is {self.consecutive!r}. Expected a whole number >= 1 or null."
            )

    def _number(self, name: str, value: Any, least: float | None) -> None:
        fits = not isinstance(value, bool) and isinstance(value, int | float) and value == value
        if not fits or (least is not None and value < least):
            expected = "a number" if least is None else f"a number >= {least:g}"
            raise ConfigError(f"rule {self.stat!r}: {name} is {value!r}. Expected {expected}.")


# What a run is judged by. configs/default.yaml has the same numbers, each with the command and table behind it.
DEFAULT_RULES: tuple[Rule, ...] = (
    Rule(stat="kl_k3", limit=1e-4, k=5.0, ceiling=0.1, absolute=0.01),
    Rule(stat="logp_abs_diff/mean", limit=0.003, k=3.0, ceiling=0.3, absolute=0.06),
    Rule(stat="logp_abs_diff/p99", limit=0.03, k=3.0, absolute=0.5),
    Rule(stat="ratio/out_of_band", limit=0.02, k=3.0, absolute=0.25),
    Rule(stat="ess", limit=0.01, k=5.0, absolute=0.05),
    Rule(stat="honesty_gap", limit=0.005),
    Rule(stat="entropy/drift_gap", limit=0.1),
    Rule(stat="confident_disagreement", limit=0.005),
    Rule(stat="nonfinite_rate", limit=0.01),
    Rule(stat="entropy/nonfinite_rate", limit=0.0),
    Rule(stat="ratio/extreme", limit=4e-4, k=5.0, ceiling=0.02, absolute=4e-4),
    Rule(stat="last_token/disagreement", limit=0.05),
    Rule(stat="seq/bias_gap", limit=1.0),
    Rule(stat="correction/zeroed", limit=0.5, warn=0.8),
    Rule(stat="correction/long/zeroed", limit=0.5, warn=0.8),
    Rule(stat="correction/lost", limit=0.8, warn_only=True),
    Rule(stat="policy_drift/kl_k3", limit=0.1, warn_only=True),
    Rule(stat="entropy/relative", limit=0.1, below=True, warn_only=True),
    Rule(stat="temperature/gap", limit=1e-6, warn_only=True),
    Rule(stat="reward/parted", limit=0.5, warn=1.0, warn_only=True),
    Rule(stat="completions/duplicates", limit=0.05, warn=1.0, warn_only=True),
    Rule(stat="completions/probability", limit=0.9, warn=1.0, warn_only=True),
    Rule(stat="completions/stopped_but_masked", limit=0.01, warn_only=True),
    Rule(stat="reference/base_moved", limit=0.001, warn_only=True),
    Rule(stat="reference/merged", limit=0.0, warn_only=True),
    Rule(stat="reference/start_kl_k3", limit=0.01, warn_only=True),
    Rule(stat="teacher/temperature_gap", limit=1e-6, warn_only=True),
    Rule(stat="teacher/mass_max", limit=1.001, warn_only=True),
    Rule(stat="teacher/missing", limit=0.01, warn_only=True),
    Rule(stat="teacher/foreign", limit=0.0, warn_only=True),
    Rule(stat="floor/engine_excess", limit=0.003),
    # as of all ranks together, in a bound of ``consecutive`` windows: the first at it halts
    Rule(stat="replica/kl_k3", limit=1e-4, k=5.0, absolute=0.01, consecutive=1),
    Rule(stat="replica/logp_abs_diff/mean", limit=0.003, k=3.0, absolute=0.06, consecutive=1),
    # limit: -log10(evidence_alpha). Each is decided over the whole run: the first window at it halts
    Rule(stat="evidence/honesty", limit=4.0, warn=0.75, consecutive=1),
    Rule(stat="evidence/drift", limit=4.0, warn=0.75, consecutive=1),
    Rule(stat="evidence/entropy", limit=4.0, warn=0.75, consecutive=1),
    Rule(stat="evidence/change", limit=4.0, warn=1.0, warn_only=True),
)

# The smallest effects that matter to the sequential tests: of the mean ratio (0.002 a token is a factor e in the ratio
# of 500 tokens) and of mean Δ; of |Δ| and k3 the limits that the rules set on the excess; of the entropy of what was
# sampled a fifth of its rule's limit.
EVIDENCE_EFFECTS = {
    "honesty": 0.002,
    "kl_k1": 0.002,
    "logp_abs_diff/mean": 0.001,
    "kl_k3": 1e-4,
    "entropy/drift": 0.02,
}


def rules_over_defaults(rules: Any, consecutive: int, evidence: float = 4.0) -> tuple[Rule, ...]:
    """The default rules with ``rules`` (``ParityConfig.rules``) laid over, each with its ``consecutive`` filled in.

    ``evidence``: the limit of the default rules on evidence.
    """
    from ..metrics.scalars import SCALARS

    merged = {
        rule.stat: replace(rule, limit=evidence) if rule.stat.startswith("evidence/") else rule
        for rule in DEFAULT_RULES
    }
    for stat, spec in as_mapping(rules, "rules").items():
        if spec is None or spec is False:
            if stat not in merged:
                raise ConfigError(
                    f"rules drops {stat!r}, which is no default rule{nearest(stat, merged)}. Expected one of: "
                    f"{', '.join(merged)}."
                )
            del merged[stat]
            continue
        keys = dict(spec) if isinstance(spec, Mapping) else {"limit": spec}
        if not isinstance(spec, Mapping) or (keys.get("below") and "k" not in keys):
            keys |= {
                "k": None,
                "ceiling": None,
                "absolute": None,
            }  # an absolute limit, not one over the noise floor
        refuse_unknown(keys, [f.name for f in fields(Rule) if f.name != "stat"], f"rules.{stat}")
        if stat in merged:
            merged[stat] = replace(merged[stat], **keys)
        elif "limit" not in keys and stat in SCALARS:
            raise ConfigError(f"rules.{stat} sets {sorted(keys)} but no limit. Add one: {{'limit': 0.01}}.")
        else:
            merged[stat] = Rule(**({"limit": 0.0} | keys | {"stat": stat}))  # names an unknown statistic
    return tuple(
        rule if rule.consecutive is not None else replace(rule, consecutive=consecutive) for rule in merged.values()
    )


def as_mapping(rules: Any, name: str) -> dict[str, Any]:
    """A setting that is a mapping, given as one, as JSON, or (``rules``) as Rule objects; None is empty."""
    if isinstance(rules, str):
        rules = from_json(rules, name)
    if rules is None:
        return {}
    if isinstance(rules, Mapping):
        return dict(rules)
    if isinstance(rules, list | tuple) and all(isinstance(rule, Rule) for rule in rules):
        return {rule.stat: {f.name: getattr(rule, f.name) for f in fields(Rule) if f.name != "stat"} for rule in rules}
    raise ConfigError(
        f"{name} is a {type(rules).__name__}: {rules!r}. Expected a mapping"
        + (" of statistic to limit, or Rule objects." if name == "rules" else ".")
    )


def refuse_unknown(values: Mapping[str, Any], known: list[str], where: str) -> None:
    """Raise ConfigError for the first key that is not known."""
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key {key!r}{nearest(str(key), known)}. Known keys: {', '.join(known)}."
            )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is spelled most alike; empty where none is."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
