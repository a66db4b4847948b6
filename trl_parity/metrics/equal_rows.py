"""Completions of one prompt that are equal: one draw handed out several times, or a policy that is certain. Numpy.

Of two independent draws of a law p the second is equal to the first with probability p(first). Of g completions of a
prompt, which the engine gave the probabilities p_i:

    pairs = Σ g (g - 1) / 2,    expected = Σ_i (g - 1) / 2 p_i

over the prompts of a batch of one rank. Where ranks hold less than half of the pairs of groups of g, the rows c that a
draw has over ranks, on average, tell: of the pairs (c - 1) / (g - 1) are equal.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["equal_pairs", "equal_scalars"]

_EXPECTED = 10.0  # times as many may be equal

_PAIRS = 3.0  # and so many more: of a few pairs one is soon equal


def equal_pairs(draws: np.ndarray, prompts: np.ndarray, logprobs: np.ndarray) -> tuple[int, int, float]:
    """Pairs of completions of one prompt: all of them, equal ones, and how many would be by their probability.

    (B,) each: ``draws`` and ``prompts`` number equal rows, and rows of one prompt, alike, from 0 on; ``logprobs`` of
    whole completions.
    """
    copies, sizes = np.bincount(draws), np.bincount(prompts)
    others = sizes[prompts] - 1  # of the same prompt
    pairs, equal = int(others.sum()) // 2, int((copies * (copies - 1)).sum()) // 2
    return pairs, equal, 0.5 * float(others @ np.exp(np.minimum(logprobs, 0.0)))


def equal_scalars(part: np.ndarray, copies: float, group: float) -> dict[str, float | None]:
    """``completions/*`` of a window. ``part``: its rows, pairs, equal ones, expected ones and Σ p.

    ``copies``: rows that a draw has, over all ranks, on average. ``group``: completions that the trainer asks for a
    prompt; not finite: not known.
    """
    if not part.any():  # no prompts are known, or it is a noise floor's
        return {}
    rows, pairs, equal, expected, probability = part.tolist()
    found: dict[str, float | None] = {"completions/probability": probability / rows}
    if math.isfinite(group) and group > 1 and pairs < rows * (group - 1) / 4:  # the rest is on other ranks
        pairs = rows * (group - 1) / 2
        equal, expected = pairs * min(1.0, (copies - 1) / (group - 1)), pairs * probability / rows
    if pairs:
        found["completions/equal_pairs"] = equal / pairs
        found["completions/duplicates"] = max(0.0, equal - _EXPECTED * expected - _PAIRS) / pairs
    return found
