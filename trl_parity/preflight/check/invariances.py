"""An engine against itself: what must not change its answers, row by row.

All greedy: no random number is in it, and the law reported is that at temperature 1 whatever the mode of log-probs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ...engine.offline import BenchEngine, Sampled
from ...records import SamplingSettings
from ...report.format import number
from .reference import Reference, Scored
from .rows import Limits, Row, RowVerdict, not_run, within_floor
from .statistics import Sums, exact_kl
from .trials import LAW_ENTRIES

__all__ = ["Ask", "Noise", "asked", "gap_row", "own_rows", "update_prefix_row", "update_rows"]

_GREEDY = SamplingSettings(temperature=0.0)

_PLAIN = SamplingSettings()

PREFIX_TITLE = "prefix cache cold and warm"

UPDATE_TITLES = (
    "after a weight update: the new weights",
    "after a weight update: the prefix cache",
    "after the old weights again",
)

_STEP = 0.05  # of a tensor's standard deviation: an update that can't be overlooked


@dataclass(frozen=True, slots=True)
class Ask:
    """Contexts that are asked for again and again."""

    contexts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    max_tokens: int
    settings: SamplingSettings = _GREEDY

    def whole(self, vocab: int) -> list[bool]:
        """For which of them whole laws are asked for."""
        few = max(1, LAW_ENTRIES // (vocab * self.max_tokens))
        return [i < few for i in range(len(self.contexts))]


@dataclass(frozen=True, slots=True)
class Noise:
    """How far an engine may be from itself: KL of its dtype's noise, and the limits it is part of."""

    kl: float
    dtype: str
    limits: Limits

    @property
    def limit(self) -> float:
        """Of a mean KL."""
        return max(self.limits.least_kl, self.limits.k * self.kl)


def asked(engine: BenchEngine, ask: Ask, *, cold: bool = True, order: Sequence[int] | None = None) -> list[Sampled]:
    """The engine's answers in the order of the contexts, whatever order they are sent in."""
    order = list(order) if order is not None else list(range(len(ask.contexts)))
    whole = ask.whole(engine.vocab_size)
    given = engine.sample(
        [ask.contexts[i] for i in order], ask.settings, max_tokens=ask.max_tokens, seeds=[ask.seeds[i] for i in order],
        whole=[whole[i] for i in order], cold=cold,
    )  # fmt: skip
    out: list[Sampled] = [given[0]] * len(order)
    for at, one in zip(order, given, strict=True):
        out[at] = one
    return out


def gaps(one: Sequence[Sampled], other: Sequence[Sampled]) -> tuple[Sums, Sums, int]:
    """(exact KL, Δ² / 2 of the tokens, tokens alike) as long as both went the same way."""
    kl, halves, alike = [], [], 0
    for a, b in zip(one, other, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y), None)
        common = len(a.token_ids) if same is None else same
        alike += common
        halves.append((a.logprobs[:common] - b.logprobs[:common]).square() / 2)
        if a.laws is not None and b.laws is not None:
            upto = min(common + 1, len(a.laws))  # where they part, the context is still the same
            kl.append(exact_kl(b.laws[:upto], a.laws[:upto]))
    none = torch.zeros(0)
    return Sums.of(torch.cat(kl) if kl else none), Sums.of(torch.cat(halves) if halves else none), alike


def gap_row(
    id: str, title: str, one: Sequence[Sampled], other: Sequence[Sampled], noise: Noise, evidence: str, fix: str
) -> Row:
    """Whether two sets of answers are one law, up to the noise of the dtype."""
    kl, halves, alike = gaps(one, other)
    value = max(x for x in (kl.mean, halves.mean, 0.0) if not math.isnan(x))
    total = sum(len(a.token_ids) for a in one)
    fails = not within_floor(value, noise.kl, noise.limits)
    return Row(
        id=id, group="invariances", title=title, statistic="mean KL, nats", value=value, limit=noise.limit,
        floor=noise.kl, worst=max(kl.maximum, halves.maximum), tokens=max(kl.count, halves.count), trials=len(one),
        verdict=RowVerdict.FAIL if fails else RowVerdict.PASS,
        evidence=f"{evidence}; {alike:,} of {total:,} greedy tokens alike before they part",
        fix=fix if fails else "",
    )  # fmt: skip


_BATCH_FIX = "VLLM_BATCH_INVARIANT=1 where the platform has it; a wider dtype"


def own_rows(engine: BenchEngine, ask: Ask, base: Sequence[Sampled], noise: Noise) -> Iterator[Row]:
    """What one engine can tell of itself. ``base``: its answers to ``ask``, cold and in one batch."""
    alone = [asked(engine, Ask((c,), (s,), ask.max_tokens))[0] for c, s in zip(ask.contexts, ask.seeds, strict=True)]
    whole = ask.whole(engine.vocab_size)
    alone = [one if w else Sampled(one.token_ids, one.logprobs, None, 0) for one, w in zip(alone, whole, strict=True)]
    words = f"{len(base)} requests one by one, and together"
    yield gap_row("batch", "alone and in a batch", base, alone, noise, words, _BATCH_FIX)
    order = list(reversed(range(len(ask.contexts))))
    turned = asked(engine, ask, order=order)
    yield gap_row("order", "order of the batch", base, turned, noise, "the same batch, last first", _BATCH_FIX)

    one = replace(ask, settings=_PLAIN)
    first, again = asked(engine, one), asked(engine, one)
    other = asked(engine, replace(one, seeds=tuple(s + 7919 for s in ask.seeds)))
    same = sum(a.token_ids == b.token_ids for a, b in zip(first, again, strict=True))
    moved = sum(a.token_ids != b.token_ids for a, b in zip(first, other, strict=True))
    yield Row(
        id="seed", group="invariances", title="sampling is reproduced by its seed", statistic="answers reproduced",
        value=same / len(base), limit=1.0, at_least=True, trials=len(base), tokens=sum(len(a.token_ids) for a in base),
        verdict=RowVerdict.PASS if same == len(base) else RowVerdict.FAIL,
        evidence=f"{same} of {len(base)} answers are the same with the same seed, {moved} are others with another",
        fix="" if same == len(base) else "a seed in each request; the same batch shape, or batch invariance",
    )  # fmt: skip
    yield _prefill_decode(engine, ask, base, noise)


def _prefill_decode(engine: BenchEngine, ask: Ask, base: Sequence[Sampled], noise: Noise) -> Row:
    sequences = [[*c, *one.token_ids] for c, one in zip(ask.contexts, base, strict=True)]
    kl = []
    whole = [i for i, w in enumerate(ask.whole(engine.vocab_size)) if w]
    while whole and sum(len(sequences[i]) for i in whole) * engine.vocab_size > 4 * LAW_ENTRIES:
        whole.pop()
    for i, laws in zip(whole, engine.prefill_laws([sequences[i] for i in whole]) if whole else (), strict=True):
        decoded = base[i].laws
        if decoded is not None:
            kl.append(exact_kl(decoded, laws[-len(decoded) :]))
    rescored = engine.rescore(sequences)
    halves = Sums.of(
        torch.cat(
            [
                (scores[-len(one.token_ids) :].double() - one.logprobs).square() / 2
                for scores, one in zip(rescored, base, strict=True)
            ]
        )
    )
    sums = Sums.of(torch.cat(kl)) if kl else Sums()
    value = max(x for x in (sums.mean, halves.mean, 0.0) if not math.isnan(x))
    fails = not within_floor(value, noise.kl, noise.limits)
    return Row(
        id="prefill_decode", group="invariances", title="prefill and decode", statistic="mean KL, nats", value=value,
        limit=noise.limit, floor=noise.kl, worst=max(sums.maximum, halves.maximum), tokens=halves.count,
        trials=len(base), verdict=RowVerdict.FAIL if fails else RowVerdict.PASS,
        evidence=f"{sums.count:,} laws sampled from token by token, and by prefill of the whole",
        fix="another attention_backend; kv_cache_dtype: auto" if fails else "",
    )  # fmt: skip


def cacheable(engine: BenchEngine, vocab: Sequence[int], seed: int, room: int, max_tokens: int) -> Ask | None:
    """Contexts that fill at least one block of the prefix cache; None where none fits."""
    length = engine.block_size + max(2, engine.block_size // 4)
    if length + max_tokens >= room:
        length = engine.block_size + 1
    if length + max_tokens >= room:
        return None
    rng = random.Random(seed)
    contexts = tuple(tuple(rng.choices(vocab, k=length)) for _ in range(4))
    return Ask(contexts, tuple(range(seed, seed + 4)), max_tokens)


def prefix_row(engine: BenchEngine, ask: Ask, noise: Noise) -> Row:
    """Cold and warm: the same requests with and without keys and values of an earlier one."""
    cold = asked(engine, ask)
    asked(engine, ask, cold=False)
    warm = asked(engine, ask, cold=False)
    read = sum(one.cached for one in warm)
    title = PREFIX_TITLE
    if not read:
        why = f"requests of {len(ask.contexts[0])} tokens, sent twice, read nothing from the cache"
        return not_run("prefix_cache", "invariances", title, why, needed=False)
    return gap_row(
        "prefix_cache", title, cold, warm, noise, f"{read:,} prompt tokens read from the cache",
        "enable_prefix_caching: false",
    )  # fmt: skip


def updated(reference: Reference, seed: int) -> dict[str, torch.Tensor]:
    """Other weights for every tensor: a step of 5 % of its standard deviation, of the same seed always the same."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in reference.named_tensors():
        spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        out[name] = (tensor + _STEP * max(spread, 1e-3) * noise).to(reference.dtype).float()
    return out


_UPDATES = dict(zip(("update", "update_prefix_cache", "update_back"), UPDATE_TITLES, strict=True))


def update_rows(
    engine: BenchEngine, reference: Reference, ask: Ask, base: Sequence[Sampled], cached: Ask | None, noise: Noise,
    seed: int,
) -> Iterator[Row]:  # fmt: skip
    """After other weights, as a sync delivers them: does the engine serve them, all of them, and nothing older.

    ``base``: its answers to ``ask`` before.
    """
    if cached is not None:  # so that there is something old to read
        asked(engine, cached, cold=False)
    values = updated(reference, seed)
    if refused := _refused(engine, reference, values):
        yield from (refused(id) for id in _UPDATES)
        return
    answered = engine.forget()
    new = asked(engine, ask)
    usual, before = _drifts(reference, (base, new), ask)
    with reference.holding(values):
        (value,) = _drifts(reference, (new,), ask)
    yield _arrived(len(values), usual, before, value, new, noise)
    if cached is not None or not engine.caches_prefixes:
        yield _forgotten(engine, cached, answered, noise)
    engine.load((name, tensor.to(reference.dtype)) for name, tensor in reference.named_tensors())
    engine.forget()
    # against the reference: what the engine was built with may have been something else
    again = asked(engine, ask)
    back = usual if _same(base, again) else _drifts(reference, (again,), ask)[0]
    limit = max(noise.limit, 4.0 * usual)
    yield Row(
        id="update_back", group="invariances", title=_UPDATES["update_back"], statistic="drift, nats", value=back,
        limit=limit, floor=noise.kl, trials=len(base), tokens=sum(len(one.token_ids) for one in base),
        verdict=RowVerdict.PASS if back <= limit else RowVerdict.FAIL,
        evidence=f"the first weights delivered again: drift {number(back)}, before any update {number(usual)}",
        fix="" if back <= limit else "a loader that restores what it replaced",
    )  # fmt: skip


def update_prefix_row(engine: BenchEngine, reference: Reference, cached: Ask, noise: Noise, seed: int) -> Row:
    """The prefix cache's row alone. The engine keeps the other weights."""
    asked(engine, cached, cold=False)
    if refused := _refused(engine, reference, updated(reference, seed)):
        return refused("update_prefix_cache")
    return _forgotten(engine, cached, engine.forget(), noise)


def _refused(
    engine: BenchEngine, reference: Reference, values: dict[str, torch.Tensor]
) -> Callable[[str], Row] | None:
    """Hand over the weights. Where the engine does not take them, what makes a row that says so."""
    try:
        engine.load((name, tensor.to(reference.dtype)) for name, tensor in values.items())
    except Exception as e:
        words = f"the engine's load_weights does not take the trainer's tensors: {type(e).__name__}: {e}"
        return lambda id: Row(
            id=id, group="invariances", title=_UPDATES[id], verdict=RowVerdict.FAIL, evidence=words,
            fix="an engine whose weights can be synced: no packed or quantized layers",
        )  # fmt: skip
    return None


def _arrived(tensors: int, usual: float, before: float, value: float, new: Sequence[Sampled], noise: Noise) -> Row:
    """The engine's new answers against the reference with the new weights (``value``), and with the old ones.

    An engine that drifted before drifts after: what counts is whether it drifts more.
    """
    limit = max(noise.limit, 4.0 * usual)
    verdict = (
        RowVerdict.FAIL if not value <= limit else RowVerdict.PASS if before > 4.0 * value else RowVerdict.UNCLEAR
    )
    words = f"{tensors} tensors moved by {_STEP:.0%} of their spread, delivered one by one: drift from the new "
    words += f"weights {number(value)}, from the old ones {number(before)}; before the update {number(usual)}"
    return Row(
        id="update", group="invariances", title=_UPDATES["update"], statistic="drift, nats", value=value, limit=limit,
        floor=noise.kl, tokens=sum(len(one.token_ids) for one in new), trials=len(new), verdict=verdict,
        evidence=words, details={"from_new": value, "from_old": before, "before": usual},
        fix="every tensor by its name, through the engine's load_weights; no packed weights"
        if verdict is RowVerdict.FAIL else "",
    )  # fmt: skip


def _same(one: Sequence[Sampled], other: Sequence[Sampled]) -> bool:
    """Whether two answers are the same to the last digit."""

    def alike(a: Sampled, b: Sampled) -> bool:
        laws = a.laws is None or (b.laws is not None and torch.equal(a.laws, b.laws))
        return a.token_ids == b.token_ids and torch.equal(a.logprobs, b.logprobs) and laws

    return all(alike(a, b) for a, b in zip(one, other, strict=True))


def _drifts(reference: Reference, answers: Sequence[Sequence[Sampled]], ask: Ask) -> list[float]:
    """Of each set of answers, scored together, see ``_drift``."""
    pairs = [(c, one) for some in answers for c, one in zip(ask.contexts, some, strict=True)]
    sequences = [[*c, *one.token_ids] for c, one in pairs]
    spans = [
        torch.arange(len(c) - 1, len(ids) - 1) if one.laws is not None else None
        for (c, one), ids in zip(pairs, sequences, strict=True)
    ]
    scored, each = reference.score(sequences, spans), len(ask.contexts)
    return [_drift(ask, some, scored[i * each : (i + 1) * each]) for i, some in enumerate(answers)]


def _drift(ask: Ask, answers: Sequence[Sampled], scores: Sequence[Scored]) -> float:
    """Mean exact KL of answers from the reference, or half the mean squared gap of their tokens, the larger."""
    kl, halves = [], []
    for context, one, scored in zip(ask.contexts, answers, scores, strict=True):
        halves.append((scored.logprobs[len(context) - 1 :] - one.logprobs).square() / 2)
        if one.laws is not None and scored.laws is not None:
            kl.append(exact_kl(one.laws, scored.laws))
    found = max(float(torch.cat(x).mean()) for x in (kl, halves) if x)
    return math.inf if math.isnan(found) else found


def _forgotten(engine: BenchEngine, cached: Ask | None, answered: bool, noise: Noise) -> Row:
    title = _UPDATES["update_prefix_cache"]
    if cached is None:
        why = "the engine keeps no prefix cache"
        return not_run("update_prefix_cache", "invariances", title, why, needed=False)
    after = asked(engine, cached, cold=False)
    fresh = asked(engine, cached)
    read = sum(one.cached for one in after)
    fix = "reset_prefix_cache() after each sync, and heed its answer; or enable_prefix_caching: false"
    row = gap_row(
        "update_prefix_cache", title, fresh, after, noise,
        f"reset_prefix_cache() answered {answered}; {read:,} tokens were still read from the cache", fix,
    )  # fmt: skip
    if row.verdict is RowVerdict.PASS and not answered:
        return replace(row, verdict=RowVerdict.FAIL, fix=fix)
    return row
