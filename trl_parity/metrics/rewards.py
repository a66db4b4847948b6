"""Do the rewards of this run still look like those of an earlier one? A stored distribution and a two-sample test.

    baseline = RewardBaseline.from_rewards(old_rewards)  # the last 1,000
    comparison = baseline.compare(window.rewards)
    if comparison is not None and comparison.parted(min_effect=0.2, alpha=0.001): ...

For run rewards x (n of them) and baseline rewards y (m of them), F and G their empirical distribution functions:

    Cliff's delta   (#{x > y} - #{x < y}) / (n m) over all pairs; in [-1, 1], positive: the run's rewards are higher.
                    Equals 2U / (n m) - 1 with the Mann-Whitney U of x, ties counted half.
    KS              max over t of |F(t) - G(t)|; in [0, 1], also sees a change of spread or shape that leaves delta 0.
    p-value         of KS, two-sided, under "x and y are independent draws from one distribution".

Completions of one prompt share its difficulty: n of them in groups of sizes n_g are worth n / d independent ones, with
the design effect d = 1 + (Σ n_g² / n - 1) ρ. ρ is the intraclass correlation of the rewards' ranks, the upper end of
its one-sided 95 % interval (analysis of variance). The p-value is that of KS with as many on both sides, since a baseline
does not tell its prompts: it is taken to have been sampled as the run is.

Two limits on it. Ties make it conservative (see ``RewardBaseline.compare``). A window that overlaps the last one tests
the same rewards again. So significance alone is no news, and ``RewardComparison.parted`` asks for an effect too.

Sources: N. Cliff, "Dominance statistics: ordinal analyses to answer ordinal questions", Psychological Bulletin 114
(1993) 494-509; L. Kish, Survey Sampling (1965); ``scipy.stats.ks_2samp``. Colours of the plot: Okabe and Ito. Imports no torch, scipy or matplotlib
until they are needed.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..files import read_versioned, write_atomic

__all__ = ["MIN_REWARDS", "REWARDS_NAME", "RewardBaseline", "RewardComparison", "RewardWindow"]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1

MIN_REWARDS = 20

REWARDS_NAME = "rewards.json"  # what a run leaves beside its metrics.jsonl

# Up to this many rewards in all, scipy's exact p-value is fast and its path counts fit a float; above, the asymptotic
# one is within 7% of it (16% with 20 rewards on one side), while on 20 against 20 it is up to two times too small.
EXACT_UP_TO = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardComparison:
    """Rewards of a run against a baseline; see the module for the formulas."""

    count: int  # finite rewards of the run
    mean: float
    baseline_mean: float
    effect_size: float  # Cliff's delta, positive: the run's rewards are higher
    ks: float
    p_value: float  # of ks

    def parted(self, min_effect: float, alpha: float) -> bool:
        """Whether the difference is both significant and large: on big samples any difference is significant."""
        return self.p_value < alpha and max(abs(self.effect_size), self.ks) >= min_effect


@dataclass(frozen=True, slots=True, eq=False)
class RewardBaseline:
    """A historical distribution of rewards: at least 20 finite values, kept as a read-only float64 copy."""

    rewards: np.ndarray
    name: str = ""

    def __post_init__(self) -> None:
        values = np.array(_as_floats(self.rewards))
        if bad := int(np.count_nonzero(~np.isfinite(values))):
            raise ConfigError(
                f"reward baseline has {bad} non-finite values among {values.size}. Expected finite numbers; drop "
                "them, or use RewardBaseline.from_rewards, which does."
            )
        if values.size < MIN_REWARDS:
            raise ConfigError(
                f"reward baseline has {values.size} finite rewards. Expected at least {MIN_REWARDS}; collect more "
                "before comparing."
            )
        values.setflags(write=False)
        object.__setattr__(self, "rewards", values)

    @classmethod
    def from_rewards(cls, values: Iterable[float], limit: int = 1000, name: str = "") -> RewardBaseline:
        """The last ``limit`` finite values. Non-finite ones (``None`` among them) are dropped with a warning."""
        _check_size("limit", limit)
        given = _as_floats(values)
        finite = given[np.isfinite(given)]
        if finite.size < given.size:
            logger.warning(
                "%d of %d rewards are not finite and are left out of the baseline.",
                given.size - finite.size,
                given.size,
            )
        return cls(finite[-limit:], name)

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "count": self.rewards.size,
            "rewards": self.rewards.tolist(),
        }
        write_atomic(Path(path), json.dumps(content, allow_nan=False).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> RewardBaseline:
        """Read what ``save`` wrote. Anything else raises ``ConfigError``."""
        content = read_versioned(
            Path(path),
            (SCHEMA_VERSION,),
            {},
            expected="a reward baseline",
            remedy="write it again with RewardBaseline.save",
        )
        rewards, name = content.get("rewards"), content.get("name", "")
        if not isinstance(rewards, list) or not all(type(value) in (int, float) for value in rewards):
            raise ConfigError(f"{path}: rewards is not a list of numbers. Expected one as RewardBaseline.save writes.")
        if not isinstance(name, str):
            raise ConfigError(f"{path}: name is {name!r}. Expected a string.")
        if content.get("count") != len(rewards):
            raise ConfigError(
                f"{path} has count {content.get('count')!r} and {len(rewards)} rewards. Expected the same number; the "
                "file was cut or edited, write it again with RewardBaseline.save."
            )
        try:
            return cls(np.asarray(rewards, dtype=np.float64), name)
        except ConfigError as e:
            raise ConfigError(f"{path}: {e}") from e
        except OverflowError as e:
            raise ConfigError(f"{path}: rewards has a number no float64 can hold. Expected finite numbers.") from e

    def compare(self, rewards: Iterable[float], prompts: Iterable[int] | None = None) -> RewardComparison | None:
        """The run's ``rewards`` against this baseline; ``None`` with fewer than 20 finite ones.

        ``prompts``: for each reward a number, the same for completions of one prompt. None: all independent.

        Both sides are compared in float32, the type of TRL's rewards: a 0.1 from a tensor and a 0.1 from a file are
        a tie, not a difference.

        Ties (0/1 rewards, say) keep ``ks`` and ``effect_size`` exact and make ``p_value`` conservative: it is
        computed as for continuous rewards, and with fewer places to differ ``ks`` comes out smaller. With 0/1
        rewards, alpha 0.05 gives under 1% false alarms on two samples of 1,000, and needs a difference of means of
        0.06. The p-value is exact (but for ties) up to 1,000 rewards in all and asymptotic above.
        """
        given = _as_floats(rewards)
        finite = np.isfinite(given)
        run = given[finite]
        if run.size < MIN_REWARDS:
            return None
        x, y = _comparable(run), _comparable(self.rewards)
        try:
            from scipy.stats import ks_2samp, kstwo
        except ImportError as e:
            raise ConfigError("comparing rewards needs scipy, which is not installed. Run: pip install scipy.") from e

        # pairs in whole numbers: swapping the samples flips the sign to the last bit
        lower = np.searchsorted(y, x, side="left").sum()  # pairs with baseline < run
        higher = x.size * y.size - np.searchsorted(y, x, side="right").sum()  # pairs with baseline > run
        test = ks_2samp(x, y, method="exact" if x.size + y.size <= EXACT_UP_TO else "asymp")
        p_value = float(test.pvalue)
        effect = 1.0 if prompts is None else design_effect(run, np.asarray(list(prompts))[finite])
        if effect > 1.0:
            worth = x.size * y.size / (x.size + y.size) / effect
            p_value = max(p_value, float(kstwo.sf(test.statistic, max(1, int(worth)))))
        return RewardComparison(
            count=run.size,
            mean=float(run.mean()),
            baseline_mean=float(self.rewards.mean()),
            effect_size=float(lower - higher) / (x.size * y.size),
            ks=float(test.statistic),
            p_value=p_value,
        )


class RewardWindow:
    """The last ``size`` finite rewards of a run."""

    def __init__(self, size: int = 1000):
        _check_size("size", size)
        self._rewards: deque[float] = deque(maxlen=size)
        self._prompts: deque[int | None] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._rewards)

    @property
    def rewards(self) -> np.ndarray:
        """A copy, oldest first."""
        return np.array(self._rewards, dtype=np.float64)

    @property
    def prompts(self) -> np.ndarray:
        """For each of ``rewards`` a number, the same for those of one prompt."""
        known = [x for x in self._prompts if x is not None]
        apart = count(max(known, default=0) + 1)
        return np.array([next(apart) if x is None else x for x in self._prompts], dtype=np.int64)

    def extend(self, values: Iterable[float | None], prompts: Sequence[int] | None = None) -> list[float]:
        """Add rewards; non-finite ones (``None`` among them) are dropped. Returns those that were added.

        ``prompts``: for each a number, the same for completions of one prompt. None: each of a prompt of its own.
        """
        values = list(values)
        numbers = repeat(None) if prompts is None else prompts
        finite = [
            (x, number)
            for value, number in zip(values, numbers, strict=prompts is not None)
            if value is not None and math.isfinite(x := float(value))
        ]
        self._rewards.extend(x for x, _ in finite)
        self._prompts.extend(number for _, number in finite)
        return [x for x, _ in finite]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept: dict[str, Any] = {"rewards": list(self._rewards)}
        return kept | ({} if set(self._prompts) <= {None} else {"prompts": list(self._prompts)})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``; a smaller window keeps the newest rewards."""
        rewards = _finite(state["rewards"]).tolist()
        self._rewards.clear()
        self._prompts.clear()
        self._rewards.extend(rewards)
        self._prompts.extend(state.get("prompts") or [None] * len(rewards))


def design_effect(rewards: np.ndarray, prompts: np.ndarray) -> float:
    """How many rewards are worth one independent reward, where those of one prompt resemble each other.

    ``rewards`` and ``prompts``: (n,). 1 where each prompt has one reward; see the module for the formula.
    """
    from scipy.stats import f, rankdata

    _, group, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    n, groups = len(rewards), len(sizes)
    per_prompt = float((sizes**2).sum()) / n  # mean size of the group a reward is in
    if groups == n:
        return 1.0
    if groups == 1:
        return per_prompt
    ranks = rankdata(rewards)
    means = np.bincount(group, ranks) / sizes
    within = float(((ranks - means[group]) ** 2).sum()) / (n - groups)
    if within == 0:
        return per_prompt  # all of a prompt alike
    between = float((sizes * (means - ranks.mean()) ** 2).sum()) / (groups - 1)
    ratio = between / within / float(f.ppf(0.05, groups - 1, n - groups))
    typical = (n - per_prompt) / (groups - 1)  # size of a group; all of one size: that size
    return 1.0 + (per_prompt - 1.0) * min(max((ratio - 1.0) / (ratio + typical - 1.0), 0.0), 1.0)


def _as_floats(values: Any) -> np.ndarray:
    """``values`` as a 1-d float64 array; ``None`` becomes NaN."""
    try:
        raw = np.asarray(values if hasattr(values, "__array__") else list(values))
        if raw.ndim == 1 and raw.dtype.kind in "biufO":
            return raw.astype(np.float64)
        seen = f"an array of shape {raw.shape} and type {raw.dtype}"
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        seen = f"a {type(values).__name__} ({e})"
    raise DataError(f"rewards are {seen}. Expected one flat sequence of numbers; of a tensor, pass tensor.tolist().")


def _finite(values: Any) -> np.ndarray:
    array = _as_floats(values)
    return array[np.isfinite(array)]


def _comparable(values: np.ndarray) -> np.ndarray:
    """Rounded to float32 and sorted."""
    largest = float(np.finfo(np.float32).max)
    return np.sort(np.clip(values, -largest, largest).astype(np.float32)).astype(np.float64)


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < MIN_REWARDS:
        raise ConfigError(f"{name} is {value!r}. Expected a whole number >= {MIN_REWARDS}.")
