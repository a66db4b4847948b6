"""The one thing that, changed in a distribution, brings it closest to what the engine reported.

Every fit takes tokens and the best distribution so far, and returns one with a single thing changed, or None if
nothing in its family improves on it (``improves``). It minimizes mean Huber(Δ), Δ = the distribution's log-prob - the
reported one, which a minority of tokens that are off for other reasons does not decide. Where anything but processed
log-probs is reported, nothing is fitted: None. Logits need no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..scoring.sampling import penalize, settings_of
from .distribution import (
    HEAD,
    PROCESSED,
    Distribution,
    Sketch,
    Tokens,
    biased,
    chunks,
    curved,
    huber,
    improves,
    log_probs,
    logsumexp,
    seen_tokens,
    sketch_of,
    target_values,
)

__all__ = ["fit_penalty", "fit_shift", "fit_soft_cap", "fit_temperature", "fit_truncation", "mle_temperature"]

_OUTSIDE = 0.02  # a truncation that cuts off more of the sampled targets is impossible

TIE = 1.05  # nothing cut off, or a plain ban, is preferred to a number that fits better by less


def minimize(objective: Callable[[Tensor], Tensor], grid: Tensor, rounds: int) -> tuple[float, float]:
    """Argument and value of the least objective on an ascending grid, refined there: each round a third as wide."""
    values, thirds = objective(grid), evenly(1 / 3, 2 / 3, 2)
    for _ in range(rounds):
        best = int(values.argmin())
        nearby = slice(max(best - 1, 0), best + 2)
        low, middle, high = grid[nearby][0], grid[best], grid[nearby][-1]
        new = torch.cat([torch.lerp(low, middle, thirds), torch.lerp(middle, high, thirds)])
        grid, order = torch.cat([grid[nearby], new]).sort()
        values = torch.cat([values[nearby], objective(new)])[order]
    best = int(values.argmin())
    return float(grid[best]), float(values[best])


def _each(objective: Callable[[float], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda grid: torch.stack([objective(x) for x in grid.tolist()]).cpu()


def evenly(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


def _sampling(distribution: Distribution, name: str, value: float) -> Distribution:
    changes: Any = {name: value}
    return replace(distribution, sampling=replace(distribution.sampling, **changes))


def if_better(tokens: Tokens, before: Tensor, distribution: Distribution) -> Distribution | None:
    """``distribution``, if it improves on log-probs ``before`` (n,)."""
    after = log_probs(tokens, distribution).logprobs
    return distribution if improves(huber(before - tokens.reported), huber(after - tokens.reported)) else None


def fit_temperature(tokens: Tokens, distribution: Distribution) -> Distribution | None:
    """The temperature within a factor 8 of the distribution's that fits best; truncation is redone at each.

    None: no gain, or the edge of the range, where it is no temperature that makes the distribution so sharp or flat.
    """
    if distribution.report != PROCESSED:
        return None
    sketch = sketch_of(tokens, distribution)
    settings = settings_of(distribution.sampling, sketch.gaps)

    def score(tau: float) -> Tensor:
        return sketch.scores(settings, sketch.mass(tau), tau)[0].squeeze(-1)

    octaves, _ = minimize(_each(lambda x: huber(score(2.0**x) - tokens.reported).mean()), evenly(-3, 3, 13), 8)
    if abs(octaves) > 2.99:
        return None
    return if_better(
        tokens, score(1.0), _sampling(distribution, "temperature", distribution.sampling.temperature * 2.0**octaves)
    )


def fit_soft_cap(tokens: Tokens, distribution: Distribution) -> Distribution | None:
    """The soft cap that fits best, put on the distribution's logits or taken off them (``curved``).

    From one that lets the largest logit through by a sixth to one that has just let it through. None: no gain.
    """
    if distribution.report != PROCESSED or distribution.curvature:
        return None
    sketch = sketch_of(tokens, distribution)
    settings, t = settings_of(distribution.sampling, sketch.gaps), distribution.sampling.temperature
    z, target = (sketch.top[:, None] - sketch.gaps) * t, (sketch.top - sketch.target) * t
    largest = float(torch.where(torch.isinf(z), 0.0, z).abs().amax())
    if not 0.0 < largest < math.inf:
        return None

    def score(x: float) -> Tensor:
        top = curved(sketch.top * t, x / largest)
        under = Sketch(
            (top[:, None] - curved(z, x / largest)) / t, sketch.size, (top - curved(target, x / largest)) / t, top / t
        )
        return under.scores(settings, under.mass())[0].squeeze(-1)

    grid = torch.cat([evenly(-0.9999, -0.9, 8), evenly(-0.8, 6.0, 35)])
    x, _ = minimize(_each(lambda x: huber(score(x) - tokens.reported).mean()), grid, 8)
    return if_better(tokens, score(0.0), replace(distribution, curvature=x / largest)) if x else None


def fit_truncation(tokens: Tokens, distribution: Distribution) -> Distribution | None:
    """The top_p, top_k or min_p, put in place of the distribution's or left out, that fits best; its other two stay.

    One that cuts off more than 2 % of the targets is refused: the engine can't have sampled them. top_k is exact up
    to 1024 and a multiple of ``ceil((V - 1024) / 1024)`` more beyond. None: no gain.
    """
    if distribution.report != PROCESSED:
        return None
    sketch, vocab = sketch_of(tokens, distribution), tokens.logits.shape[-1]
    mass, settings = sketch.mass(), settings_of(distribution.sampling, sketch.gaps)
    reported = tokens.reported.double().unsqueeze(-1)

    def objective(index: int, value_of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        values = value_of(x.to(mass.device))
        candidate = [values if i == index else other.expand_as(values) for i, other in enumerate(settings)]
        logprobs, outside = sketch.scores(candidate, mass)
        possible = outside.double().mean(0) <= _OUTSIDE
        return torch.where(possible, huber(logprobs - reported).mean(0), torch.inf).cpu()

    ks = torch.cat([evenly(1, 128, 128), evenly(math.log(129), math.log(vocab + 129), 100).exp()])
    families: list[tuple[str, Callable[[Tensor], Tensor], Tensor, float]] = [  # the last: where nothing is cut off
        ("top_k", torch.round, ks[ks < vocab], 0.0),
        ("top_p", torch.clone, torch.cat([evenly(0.005, 0.995, 199), evenly(0.996, 0.9999, 5)]), 1.0),
        ("min_p", torch.exp, evenly(math.log(1e-6), -0.01, 60), -math.inf),
    ]
    found = []
    for index, (name, value_of, grid, off) in enumerate(families):
        x, value = minimize(partial(objective, index, value_of), grid, 6)
        plain = float(objective(index, value_of, grid.new_tensor([off])))
        value, x = (plain, off) if plain <= TIE * value + 1e-12 else (value, x)
        setting = float(value_of(grid.new_tensor(x)))
        found.append((value, name, int(setting) if name == "top_k" else setting))
    return if_better(tokens, sketch.scores(settings, mass)[0].squeeze(-1), _sampling(distribution, *min(found)[1:]))


def fit_penalty(tokens: Tokens, distribution: Distribution) -> Distribution | None:
    """The repetition [0.5, 3], presence or frequency penalty [-2, 2], in place of the distribution's, that fits best.

    log Σ e^z' = log(Σ_unseen e^z + Σ_seen e^z'): the unseen are summed once, nothing is subtracted. The kept mass of
    a truncated distribution is taken to stay as it is, then redone and the fit repeated. None: no gain, or an edge.
    """
    if distribution.report != PROCESSED or not bool(tokens.real.any()):
        return None
    seen = _seen_logits(tokens, distribution)

    def loss(name: str, aim: Tensor, x: float) -> Tensor:
        return huber(seen.scores(_sampling(distribution, name, x)) - aim).mean()

    def refitted(best: Distribution, exact: Tensor, grids: dict[str, Tensor]) -> tuple[str, float]:
        aim = tokens.reported - (exact - seen.scores(best))
        found = [(*minimize(_each(partial(loss, name, aim)), grid, 5), name) for name, grid in grids.items()]
        x, _, name = min(found, key=lambda x: x[1])
        return name, x

    now = log_probs(tokens, distribution).logprobs
    name, x = refitted(distribution, now, _PENALTIES)
    if min(abs(x - float(_PENALTIES[name][edge])) for edge in (0, -1)) < 1e-3:
        return None
    best = _sampling(distribution, name, x)
    if distribution.sampling.truncates:
        exact = log_probs(tokens, best).logprobs
        best = _sampling(distribution, *refitted(best, exact, {name: evenly(x - 0.3, x + 0.3, 7)}))
    return if_better(tokens, now, best)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SeenLogits:
    """n tokens by what penalties move of them: the logits of the M context tokens seen, and what the others sum to."""

    row: Tensor  # (M,) ascending: which of the n
    logits: Tensor  # (M,) before penalties and temperature
    counts: Tensor  # (M,) how often it was generated
    unseen: Tensor  # (n,) fp64, log Σ e^(z / T) of the others; -inf: there are none
    top: Tensor  # (n,) the largest z / T
    target: Tensor  # (n,) fp64, the target's z / T
    target_at: Tensor  # (n,) where in M the target is
    target_seen: Tensor  # (n,) bool: whether it is

    def scores(self, distribution: Distribution) -> Tensor:
        """The targets' log-probs (n,) with its penalties, at the temperature of these logits, nothing cut off."""
        penalized = penalize(
            self.logits, torch.ones_like(self.row, dtype=torch.bool), self.counts, distribution.sampling
        )
        z = penalized / distribution.sampling.temperature
        weight = (z - self.top[self.row]).clamp(max=80.0).exp()
        total = torch.zeros_like(self.top).index_add(0, self.row, weight).log() + self.top
        return torch.where(self.target_seen, z[self.target_at], self.target) - torch.logaddexp(self.unseen, total)


def _seen_logits(tokens: Tokens, distribution: Distribution) -> _SeenLogits:
    temperature, vocab = distribution.sampling.temperature, tokens.logits.shape[-1]
    row, ids, counts = seen_tokens(tokens)
    unseen, seen, targets, tops = [], [], [], []
    first = 0
    for part in chunks(tokens):
        z = biased(part, distribution)
        here = (row >= first) & (row < first + len(z))
        at = (row[here] - first, ids[here])
        seen.append(z[at])
        targets.append(target_values(z, part).double() / temperature)
        tops.append(z.amax(-1) / temperature)
        z[at] = -torch.inf
        unseen.append(logsumexp(z.div_(temperature)).nan_to_num(nan=-torch.inf))  # nan: all are seen
        first += len(z)
    keys = row * vocab + ids
    wanted = torch.arange(first, device=row.device) * vocab + tokens.targets
    target_at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return _SeenLogits(
        row=row,
        logits=torch.cat(seen),
        counts=counts,
        unseen=torch.cat(unseen),
        top=torch.cat(tops),
        target=torch.cat(targets),
        target_at=target_at,
        target_seen=keys[target_at] == wanted,
    )


_PENALTIES = {
    "repetition_penalty": evenly(math.log(0.5), math.log(3.0), 13).exp(),
    "presence_penalty": evenly(-2.0, 2.0, 13),
    "frequency_penalty": evenly(-2.0, 2.0, 13),
}


def fit_shift(reported: Tensor, logprobs: Tensor, mask: Tensor, shifts: tuple[int, ...] = (-2, -1, 1, 2)) -> Tensor:
    """Per sequence the s for which ``reported[t + s]`` belongs to token t: 1 if reports come one place late.

    All (B, C), result (B,) int64. 0 unless some s takes the mean Huber to less than a third of that at 0. Both t and
    t + s are in ``mask``; tokens without a partner are left out; 8 partners are the least.
    """
    width = mask.shape[-1]
    t = torch.arange(width, device=mask.device)
    means = []
    for s in (0, *shifts):
        at = (t + s).clamp(0, width - 1)
        both = mask & mask[:, at] & (at == t + s)
        total = torch.where(both, huber(logprobs - reported[:, at]), 0.0).sum(-1)
        means.append(torch.where(both.sum(-1) >= 8, total / both.sum(-1), torch.inf))
    plain, shifted = means[0], torch.stack(means[1:])
    least, best = shifted.min(0)
    chosen = torch.tensor(shifts, device=mask.device)[best]
    return torch.where(torch.isfinite(plain) & (least < plain / 3.0), chosen, 0)


def mle_temperature(tokens: Tokens, distribution: Distribution) -> tuple[float, float]:
    """The temperature the sampled tokens speak for, whatever was reported, and its standard error.

    Maximum of Σ log p_T(a), within a factor 16 of the distribution's: Σ z(a) = Σ E[z], z after bias and penalties,
    without truncation (a truncated engine looks colder). se(T) = T² sqrt(max(B, I)) / I with θ = 1/T, I = Σ Var[z] and
    B the Σ over S sequences of score², times S / (S - 1): of few sequences B alone is at times far too small. At the
    edge of the range, or with one sequence, se is inf. Banned targets are left out.
    """
    sketch = sketch_of(tokens, distribution)
    valid, gaps = torch.isfinite(sketch.target), sketch.gaps.nan_to_num(posinf=0.0)

    def moments(theta: float) -> tuple[Tensor, Tensor]:
        """Score of each token, E[gap] - gap(a), and Var[gap]."""
        weight = sketch.gaps.mul(-theta).exp_()
        weight[:, HEAD:] *= sketch.size
        weight /= weight.sum(-1, keepdim=True)
        mean = (weight * gaps).sum(-1)
        return (mean - sketch.target)[valid], (weight * (gaps - mean.unsqueeze(-1)).square()).sum(-1)[valid]

    low, high, theta = 1.0 / 16.0, 16.0, 1.0
    for _ in range(60):  # Newton's method, bisection where it leaves the bracket: the score falls with θ
        slope, information = (float(x.sum()) for x in moments(theta))
        low, high = (theta, high) if slope > 0 else (low, theta)
        step = slope / max(information, 1e-12)
        if abs(step) <= 1e-9 * theta:
            break
        theta = theta + step if low < theta + step < high else math.sqrt(low * high)
    score, variance = moments(theta)
    _, sequence = tokens.sequence[valid].unique(return_inverse=True)
    clusters, information = len(sequence.unique()), float(variance.sum())
    by_sequence = score.new_zeros(clusters).index_add(0, sequence, score)
    temperature = distribution.sampling.temperature / theta
    if clusters < 2 or information <= 0.0 or not 1.0 / 15.9 < theta < 15.9:
        return temperature, math.inf
    spread = max(float(by_sequence.square().sum()) * clusters / (clusters - 1), information)
    return temperature, temperature / theta * math.sqrt(spread) / information
