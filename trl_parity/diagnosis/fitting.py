"""Fits of sampling laws: the one thing that, changed in a law, brings it closest to what the engine reported.

Every fit takes tokens and the best law so far, and returns a law with one thing changed, or None if nothing in its
family improves on it (``improves``). It minimizes mean Huber(Δ), Δ = the law's log-prob - the
reported one, which a minority of tokens that are off for other reasons does not decide. Laws that report anything but
processed log-probs are not fitted: None. Logits need no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..scoring.sampling import penalize, settings_of
from .distribution import (
    HEAD,
    PROCESSED,
    Law,
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

_TIE = 1.05  # nothing cut off, or a plain ban, is preferred to a number that fits better by less


def _minimize(objective: Callable[[Tensor], Tensor], grid: Tensor, rounds: int) -> tuple[float, float]:
    """Argument and value of the least objective on an ascending grid, refined there: each round a third as wide."""
    values, thirds = objective(grid), _grid(1 / 3, 2 / 3, 2)
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


def _grid(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


def _sampling(law: Law, name: str, value: float) -> Law:
    changes: Any = {name: value}
    return replace(law, sampling=replace(law.sampling, **changes))


def _if_better(tokens: Tokens, before: Tensor, law: Law) -> Law | None:
    """``law``, if it improves on log-probs ``before`` (n,)."""
    after = log_probs(tokens, law).logprobs
    return law if improves(huber(before - tokens.reported), huber(after - tokens.reported)) else None


def fit_temperature(tokens: Tokens, law: Law) -> Law | None:
    """The temperature within a factor 8 of the law's that fits best; truncation is redone at each.

    None: no gain, or the edge of the range, where it is not a temperature that makes the law so sharp or flat.
    """
    if law.report != PROCESSED:
        return None
    sketch = sketch_of(tokens, law)
    settings = settings_of(law.sampling, sketch.gaps)

    def score(tau: float) -> Tensor:
        return sketch.scores(settings, sketch.mass(tau), tau)[0].squeeze(-1)

    octaves, _ = _minimize(_each(lambda x: huber(score(2.0**x) - tokens.reported).mean()), _grid(-3, 3, 13), 8)
    if abs(octaves) > 2.99:
        return None
    return _if_better(tokens, score(1.0), _sampling(law, "temperature", law.sampling.temperature * 2.0**octaves))


def fit_soft_cap(tokens: Tokens, law: Law) -> Law | None:
    """The soft cap that fits best, put on the law's logits or taken off them (``curved``).

    From one that lets the largest logit through by a sixth to one that has just let it through. None: no gain.
    """
    if law.report != PROCESSED or law.curvature:
        return None
    sketch = sketch_of(tokens, law)
    settings, t = settings_of(law.sampling, sketch.gaps), law.sampling.temperature
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

    grid = torch.cat([_grid(-0.9999, -0.9, 8), _grid(-0.8, 6.0, 35)])
    x, _ = _minimize(_each(lambda x: huber(score(x) - tokens.reported).mean()), grid, 8)
    return _if_better(tokens, score(0.0), replace(law, curvature=x / largest)) if x else None


def fit_truncation(tokens: Tokens, law: Law) -> Law | None:
    """The top_p, top_k or min_p, put in the law's place or left out, that fits best; the law's other two stay.

    One that cuts off more than 2 % of the targets is refused: the engine can't have sampled them. top_k is exact up
    to 1024 and a multiple of ``ceil((V - 1024) / 1024)`` more beyond. None: no gain.
    """
    if law.report != PROCESSED:
        return None
    sketch, vocab = sketch_of(tokens, law), tokens.logits.shape[-1]
    mass, settings = sketch.mass(), settings_of(law.sampling, sketch.gaps)
    reported = tokens.reported.double().unsqueeze(-1)

    def objective(index: int, value_of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        values = value_of(x.to(mass.device))
        candidate = [values if i == index else other.expand_as(values) for i, other in enumerate(settings)]
        logprobs, outside = sketch.scores(candidate, mass)
        possible = outside.double().mean(0) <= _OUTSIDE
        return torch.where(possible, huber(logprobs - reported).mean(0), torch.inf).cpu()

    ks = torch.cat([_grid(1, 128, 128), _grid(math.log(129), math.log(vocab + 129), 100).exp()])
    families: list[tuple[str, Callable[[Tensor], Tensor], Tensor, float]] = [  # the last: where nothing is cut off
        ("top_k", torch.round, ks[ks < vocab], 0.0),
        ("top_p", torch.clone, torch.cat([_grid(0.005, 0.995, 199), _grid(0.996, 0.9999, 5)]), 1.0),
        ("min_p", torch.exp, _grid(math.log(1e-6), -0.01, 60), -math.inf),
    ]
    found = []
    for index, (name, value_of, grid, off) in enumerate(families):
        x, value = _minimize(partial(objective, index, value_of), grid, 6)
        plain = float(objective(index, value_of, grid.new_tensor([off])))
        value, x = (plain, off) if plain <= _TIE * value + 1e-12 else (value, x)
        setting = float(value_of(grid.new_tensor(x)))
        found.append((value, name, int(setting) if name == "top_k" else setting))
    return _if_better(tokens, sketch.scores(settings, mass)[0].squeeze(-1), _sampling(law, *min(found)[1:]))


def fit_penalty(tokens: Tokens, law: Law) -> Law | None:
    """The repetition [0.5, 3], presence or frequency penalty [-2, 2], put in the law's place, that fits best.

    log Σ e^z' = log(Σ_unseen e^z + Σ_seen e^z'): the unseen are summed once, nothing is subtracted. The kept mass of
    a truncated law is taken to stay as it is, then redone and the fit repeated. None: no gain, or an edge.
    """
    if law.report != PROCESSED or not bool(tokens.real.any()):
        return None
    temperature, vocab, n = law.sampling.temperature, tokens.logits.shape[-1], len(tokens.targets)
    rows, ids, counts = seen_tokens(tokens)
    unseen, seen, targets, tops = [], [], [], []
    first = 0
    for part in chunks(tokens):
        z = biased(part, law)
        here = (rows >= first) & (rows < first + len(z))
        at = (rows[here] - first, ids[here])
        seen.append(z[at])
        targets.append(target_values(z, part).double())
        tops.append(z.amax(-1) / temperature)
        z[at] = -torch.inf
        unseen.append(logsumexp(z.div_(temperature)).nan_to_num(nan=-torch.inf))  # nan: all are seen
        first += len(z)
    rest, before, target, top = map(torch.cat, (unseen, seen, targets, tops))
    row_top, true = top[rows], torch.ones_like(rows, dtype=torch.bool)
    keys, wanted = rows * vocab + ids, torch.arange(n, device=rows.device) * vocab + tokens.targets
    at_target = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    target_seen = keys[at_target] == wanted

    def score(law: Law) -> Tensor:  # without what truncation adds
        z = penalize(before, true, counts, law.sampling) / temperature
        total = torch.zeros_like(top).index_add(0, rows, (z - row_top).clamp(max=80.0).exp()).log() + top
        return torch.where(target_seen, z[at_target], target / temperature) - torch.logaddexp(rest, total)

    def loss(name: str, aim: Tensor, x: float) -> Tensor:
        return huber(score(_sampling(law, name, x)) - aim).mean()

    def refitted(best: Law, exact: Tensor, grids: dict[str, Tensor]) -> tuple[str, float]:
        aim = tokens.reported - (exact - score(best))
        found = [(*_minimize(_each(partial(loss, name, aim)), grid, 5), name) for name, grid in grids.items()]
        x, _, name = min(found, key=lambda x: x[1])
        return name, x

    now = log_probs(tokens, law).logprobs
    name, x = refitted(law, now, _PENALTIES)
    if min(abs(x - float(_PENALTIES[name][edge])) for edge in (0, -1)) < 1e-3:
        return None
    best = _sampling(law, name, x)
    if law.sampling.truncates:
        exact = log_probs(tokens, best).logprobs
        best = _sampling(law, *refitted(best, exact, {name: _grid(x - 0.3, x + 0.3, 7)}))
    return _if_better(tokens, now, best)


_PENALTIES = {
    "repetition_penalty": _grid(math.log(0.5), math.log(3.0), 13).exp(),
    "presence_penalty": _grid(-2.0, 2.0, 13),
    "frequency_penalty": _grid(-2.0, 2.0, 13),
}


def fit_shift(
    reported: Tensor, law_logprobs: Tensor, mask: Tensor, shifts: tuple[int, ...] = (-2, -1, 1, 2)
) -> Tensor:
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
        total = torch.where(both, huber(law_logprobs - reported[:, at]), 0.0).sum(-1)
        means.append(torch.where(both.sum(-1) >= 8, total / both.sum(-1), torch.inf))
    plain, shifted = means[0], torch.stack(means[1:])
    least, best = shifted.min(0)
    chosen = torch.tensor(shifts, device=mask.device)[best]
    return torch.where(torch.isfinite(plain) & (least < plain / 3.0), chosen, 0)


def mle_temperature(tokens: Tokens, law: Law) -> tuple[float, float]:
    """The temperature the sampled tokens speak for, whatever was reported, and its standard error.

    Maximum of Σ log p_T(a), within a factor 16 of the law's: Σ z(a) = Σ E[z], z after bias and penalties, without
    truncation (a truncated engine looks colder). With θ = 1/T and I = Σ Var[z]: se(T) = T² sqrt(max(B, I)) / I, B the
    Σ over S sequences of score², times S / (S - 1): of few sequences B alone is at times far too small. At the edge of
    the range, or with one sequence, se is inf. Banned targets are left out.
    """
    sketch = sketch_of(tokens, law)
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
    temperature = law.sampling.temperature / theta
    if clusters < 2 or information <= 0.0 or not 1.0 / 15.9 < theta < 15.9:
        return temperature, math.inf
    spread = max(float(by_sequence.square().sum()) * clusters / (clusters - 1), information)
    return temperature, temperature / theta * math.sqrt(spread) / information
