"""Which tokens of a pass the fp32 head scores where a sample is enough, and how many each of them stands for.

From the n tokens of a sequence, its last one left out, m are drawn, spread evenly from a random start: token j (from
0) where ⌊((j + 1) m + u) / n⌋ > ⌊(j m + u) / n⌋, u uniform over 0, ..., n - 1. Exactly m are drawn, each token with
probability m / n, and each drawn one stands for n / m (Horvitz and Thompson 1952). The last token is always scored,
for itself: what a sequence ends with is judged by itself.

The trainer's own head has a number for every token, so what is estimated is only what the fp32 head changes in a sum:

    Σ f(own) + Σ over scored tokens of weight x (f(fp32) - f(own))

whose expectation is Σ f(fp32) for any f. Where both heads agree but for rounding, little is left to chance, and a rare
token counts wherever it is: with its own number if it was not drawn. Entropies and what is replayed, of which the own
head knows nothing, are Σ weight x f(fp32).
"""

from __future__ import annotations

import torch

__all__ = ["TokenSample"]

_MOST = 0.5  # a larger share is not worth its noise: all tokens are scored


class TokenSample:
    """Draws ``share`` of the tokens of each sequence, at least one, with random numbers of its own.

    The same ``seed`` draws the same tokens of the same batches. ``seen``, ``drawn``: how many tokens so far.
    """

    def __init__(self, share: float, seed: int):
        self.share = share
        self.seen = self.drawn = 0
        self._generator = torch.Generator().manual_seed(seed)

    @classmethod
    def of(cls, share: float, tokens: int, least: int, seed: int) -> TokenSample | None:
        """Of a pass over so many tokens: ``share`` of them, but ``least``. None where that is most of them."""
        share = max(share, least / max(1, tokens))
        return cls(share, seed) if share <= _MOST else None

    def draw(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in ``rows`` of the tokens to score, ascending, and their weights (fp32), on its device.

        ``rows``: (N,) int64, ascending: the sequence of each token, in order. On an accelerator: one sync.
        """
        sequence = rows.cpu()
        sizes = torch.bincount(sequence)
        place = torch.arange(len(sequence)) - (sizes.cumsum(0) - sizes)[sequence]
        n = (sizes - 1).clamp(min=1)  # without the last; of one alone, nothing is drawn
        m = (n * self.share).ceil().long()
        u = (torch.rand(len(n), generator=self._generator, dtype=torch.float64) * n).long()
        n, m, u, size = (x[sequence] for x in (n, m, u, sizes))
        last = place == size - 1
        drawn = ((place + 1) * m + u) // n > (place * m + u) // n
        kept = (drawn | last).nonzero()[:, 0]
        weights = torch.where(last, 1.0, n / m)[kept]
        self.seen, self.drawn = self.seen + len(rows), self.drawn + len(kept)
        return kept.to(rows.device), weights.float().to(rows.device)
