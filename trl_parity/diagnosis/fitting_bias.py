"""Which tokens an engine bans, allows or favours behind the requests' back, fitted from what it reported."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..scoring.sampling import penalize
from .distribution import (
    PROCESSED,
    Distribution,
    Support,
    Tokens,
    biased,
    chunks,
    huber,
    improves,
    seen_tokens,
    supported,
    target_values,
)
from .fitting import TIE, evenly, if_better, minimize

__all__ = ["fit_bias", "fit_min_tokens"]

_MASS_IDS = 128  # ids of largest total probability a bias is looked for on

_LIKELY = 5.0  # expected count of an id that is never drawn with probability e^-5

_EXPECTED = 3.0  # draws of an id before its first appearance, for that to be no chance: e^-3

_EXPECTED_OF_GOOD = 1.0  # the same, where a ban of it takes half of the misfit away

_UNDRAWN_IDS = 16  # ids of largest total probability that are tried though never drawn

_BAN = -4.0  # a bias below it, among others, on an id that is never drawn is a ban

_MAX_BIASES = 8

_WORTH = 0.99  # an id is allowed back if that leaves less than this of the objective

_BIASES = (-12.0, -8.0, -5.0, -3.0, -2.0, -1.2, -0.6, -0.3, 0.0, 0.3, 0.6, 1.2, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)


def fit_bias(tokens: Tokens, distribution: Distribution) -> Distribution | None:
    """The bias on one to eight ids, the allow-list or the ban-list, added to the distribution's own, that fits best.

    One id v: e^Δ' = e^Δ / (1 + p(v)(e^b - 1)), times e^b where v is the target; b in [-12, 20], or -inf if v never is.
    Ids join while each is an improvement. Allow-list: the distinct targets, if 4 n times fewer, and ids that
    improve the fit. Ban-list: ids never drawn but expected 5 times, less those that spoil it. The kept set of a
    truncated distribution is taken to stay as it is. None: no gain.
    """
    if distribution.report != PROCESSED:
        return None
    mass = tokens.logits.new_zeros(tokens.logits.shape[-1])
    supports, scores = [], []
    for part in chunks(tokens):
        scaled, support = supported(part, distribution)
        supports.append(support)
        scores.append(target_values(scaled, part).double() - support.log_sum)
        cut = support.top.unsqueeze(-1) - scaled > support.limit.unsqueeze(-1)
        mass += scaled.sub_(support.log_sum.to(scaled.dtype).unsqueeze(-1)).exp_().masked_fill_(cut, 0.0).sum(0)
    now = torch.cat(scores)
    ids = torch.cat([tokens.targets, mass.topk(min(_MASS_IDS, len(mass))).indices]).unique()
    columns = _columns(tokens, distribution, ids, Support(*map(torch.cat, zip(*supports, strict=True))))
    found = [
        fit(columns, distribution, now, tokens.reported) for fit in (_allow_list, _ban_list, _biases)
    ]  # the last mutates
    best = min((x for x in found if x is not None), key=lambda x: x[0], default=None)
    return None if best is None else if_better(tokens, now, best[1])


def fit_min_tokens(tokens: Tokens, distribution: Distribution) -> Distribution | None:
    """The ids that are banned before so many tokens, as an engine's min_tokens bans those that end a sequence.

    An id v can't be drawn before its first appearance, as the m-th generated token: where fewer than s <= m came
    before, e^Δ' = e^Δ / (1 - p(v)). Of the ids drawn, from the second place on, and of the likeliest that never are,
    the one that fits best, with its best s; others with it, while each is an improvement and none is drawn before s.
    None: no gain, or it might be chance: fewer than 3 draws of these ids were expected before s (1, if banning them
    takes half of the misfit away).
    """
    if distribution.report != PROCESSED or distribution.late or distribution.sampling.truncates:
        return None
    before = tokens.output.sum(-1)
    places = int(before.max()) + 1 if len(before) else 0
    if places < 2:
        return None
    now, mass = [], tokens.logits.new_zeros(tokens.logits.shape[-1])
    for part in chunks(tokens):
        scaled, support = supported(part, distribution)
        now.append(target_values(scaled, part).double() - support.log_sum)
        mass += (scaled - support.log_sum[:, None]).exp().sum(0)
    ids = torch.cat([tokens.targets, mass.topk(min(_UNDRAWN_IDS, len(mass))).indices]).unique()
    first = torch.full_like(mass, places, dtype=torch.long).scatter_reduce(0, tokens.targets, before, "amin")[ids]
    ids, first = ids[first > 0], first[first > 0]
    if not len(ids):
        return None
    score = torch.cat(now)
    parts = ((part, *supported(part, distribution)) for part in chunks(tokens))
    p = torch.cat([(scaled[:, ids].double() - support.log_sum[:, None]).exp() for _, scaled, support in parts])
    plain = huber(score - tokens.reported)

    def misfit(chosen: list[int]) -> Tensor:  # (n,), where they are banned
        banned = p[:, chosen].sum(1).clamp(max=1.0 - 1e-9)
        return huber(score - torch.log1p(-banned) - tokens.reported)

    def gains(chosen: list[int], limit: int) -> Tensor:  # (s,): of a ban on the first 1, 2, ... tokens
        gain = (plain - misfit(chosen)).double()
        return gain.new_zeros(places).scatter_add(0, before, gain).cumsum(0)[:limit]

    singles = [gains([c], int(first[c])) for c in range(len(ids))]
    order = sorted(range(len(ids)), key=lambda c: -float(singles[c].max()))
    chosen, start = [order[0]], int(singles[order[0]].argmax()) + 1
    most, total = float(singles[order[0]].max()), float(plain.sum())
    for c in order[1:]:
        found = float(gains([*chosen, c], start)[-1]) if first[c] >= start else 0.0
        if total - found < (total - most) / TIE:
            chosen, most = [*chosen, c], found
    expected = float(p[:, chosen][before < start].sum())
    if start == places or expected < (_EXPECTED_OF_GOOD if most >= 0.5 * total else _EXPECTED):
        return None
    late = tuple(sorted(int(ids[c]) for c in chosen))
    return if_better(tokens, score, replace(distribution, late=late, late_from=start))


@dataclass(slots=True)
class _Columns:
    """A distribution on C ids of n tokens, (n, C) each."""

    ids: Tensor  # (C,)
    z: Tensor  # fp64, before penalties
    seen: Tensor  # bool
    counts: Tensor
    probs: Tensor  # fp64, of the kept set's distribution
    target: Tensor  # bool: the token's target

    def moved(self, b: float | Tensor, at: slice, distribution: Distribution) -> tuple[Tensor, Tensor, Tensor]:
        """With b added to an id's logit: how the target's log-prob, log Σ and the id's scaled logit move, (n, C)."""
        z, seen, counts, sampling = self.z[:, at], self.seen[:, at], self.counts[:, at], distribution.sampling
        shift = (penalize(z + b, seen, counts, sampling) - penalize(z, seen, counts, sampling)) / sampling.temperature
        total = (self.probs[:, at] * shift.expm1()).clamp(min=1e-9 - 1.0).log1p()
        return torch.where(self.target[:, at], shift, 0.0) - total, total, shift

    def apply(self, b: float, index: int, distribution: Distribution) -> Tensor:
        """Add b for good; how the targets' log-probs move, (n,)."""
        at = slice(index, index + 1)
        moved, total, shift = self.moved(b, at, distribution)
        self.probs *= total.neg().exp()
        self.probs[:, at] *= shift.exp()
        self.z[:, at] += b
        return moved.squeeze(-1)


def _columns(tokens: Tokens, distribution: Distribution, ids: Tensor, support: Support) -> _Columns:
    column = torch.full((tokens.logits.shape[-1],), -1, device=ids.device)
    column[ids] = torch.arange(len(ids), device=ids.device)
    context = column[torch.where(tokens.real, tokens.context, ids[0])]
    known = tokens.real & (context >= 0)
    target = column[tokens.targets].unsqueeze(-1) == torch.arange(len(ids), device=ids.device)
    z = torch.cat([biased(part, distribution)[:, ids] for part in chunks(tokens)])
    row, at, count = seen_tokens(replace(tokens, logits=z, context=context, real=known))
    seen, counts = torch.zeros_like(target), torch.zeros_like(z)
    seen[row, at], counts[row, at] = True, count
    scaled = penalize(z, seen, counts, distribution.sampling) / distribution.sampling.temperature
    kept = (support.top.unsqueeze(-1) - scaled <= support.limit.unsqueeze(-1)) | target
    probs = (scaled.double() - support.log_sum.unsqueeze(-1)).exp() * kept
    return _Columns(ids, z.double(), seen, counts, probs, target)


def _biases(
    columns: _Columns, distribution: Distribution, now: Tensor, reported: Tensor
) -> tuple[float, Distribution] | None:
    """Biases one by one, then each again given the others."""
    never = ~columns.target.any(0)
    bias: dict[int, float] = {}
    grid = torch.tensor(_BIASES, dtype=torch.float64)

    def loss(logprobs: Tensor) -> Tensor:
        return huber(logprobs - reported.unsqueeze(-1)).mean(0)

    def refined(index: int, start: Tensor) -> tuple[float, float]:
        at = slice(index, index + 1)

        def objective(b: Tensor) -> Tensor:
            return loss(now.unsqueeze(-1) + columns.moved(b.to(now.device), at, distribution)[0]).cpu()

        b, value = minimize(objective, start, 7)
        if never[index] and (banned := float(objective(grid.new_tensor([-math.inf])))) <= TIE * value:
            return banned, -math.inf
        return value, b

    while len(bias) < _MAX_BIASES:
        values = torch.stack(
            [loss(now.unsqueeze(-1) + columns.moved(b, slice(None), distribution)[0]) for b in _BIASES]
        )
        values[:, list(bias)] = torch.inf
        least, best = values.min(0)
        likely = least.topk(min(2, len(least)), largest=False).indices.tolist()
        _, b, index = min((*refined(i, grid[max(int(best[i]) - 1, 0) : int(best[i]) + 2]), i) for i in likely)
        after = columns.moved(b, slice(index, index + 1), distribution)[0].squeeze(-1) + now
        if not improves(huber(now - reported), huber(after - reported)):
            break
        now = now + columns.apply(b, index, distribution)
        bias[index] = b
    for index in list(bias) * 3 * (len(bias) > 1):
        if bias[index] > -math.inf:
            _, b = refined(index, evenly(-1.0, 1.0, 5))
            b = -math.inf if never[index] and bias[index] + b < _BAN else b
            now = now + columns.apply(b, index, distribution)
            bias[index] += b
    return (float(huber(now - reported).mean()), _with_bias(distribution, columns, bias)) if bias else None


def _with_bias(distribution: Distribution, columns: _Columns, bias: dict[int, float]) -> Distribution:
    merged = dict(distribution.bias)
    for index, b in bias.items():
        token = int(columns.ids[index])
        merged[token] = merged.get(token, 0.0) + b
    return replace(distribution, bias=tuple(sorted(merged.items())))


def _allow_list(
    columns: _Columns, distribution: Distribution, now: Tensor, reported: Tensor
) -> tuple[float, Distribution] | None:
    banned = ~columns.target.any(0)
    if not 2 <= int((~banned).sum()) <= len(now) // 4:  # one id alone: a distribution so sharp has simpler reasons
        return None
    kept = (columns.probs * ~banned).sum(-1, keepdim=True)
    value = _allow_back(columns, banned, kept, now - reported)
    return value, replace(distribution, allowed=frozenset(columns.ids[~banned].tolist()))


def _ban_list(
    columns: _Columns, distribution: Distribution, now: Tensor, reported: Tensor
) -> tuple[float, Distribution] | None:
    banned = ~columns.target.any(0) & (columns.probs.sum(0) >= _LIKELY)
    kept = 1.0 - (columns.probs * banned).sum(-1, keepdim=True)
    value = _allow_back(columns, banned, kept, now - reported)
    bias = dict.fromkeys(banned.nonzero().squeeze(-1).tolist(), -math.inf)
    return (value, _with_bias(distribution, columns, bias)) if bias else None


def _allow_back(columns: _Columns, banned: Tensor, kept: Tensor, delta: Tensor) -> float:
    """Clear ids of ``banned`` (C,), in place, while that is worth it; mean Huber(Δ - log kept mass (n, 1)) then."""

    def loss(kept: Tensor) -> Tensor:
        return huber(delta.unsqueeze(-1) - kept.clamp(min=1e-12).log()).mean(0)

    value = float(loss(kept))
    while True:
        least, index = loss(kept + columns.probs).masked_fill(~banned, torch.inf).min(0)
        if not float(least) < _WORTH * value:
            return value
        value, kept = float(least), kept + columns.probs[:, index].unsqueeze(-1)
        banned[index] = False
