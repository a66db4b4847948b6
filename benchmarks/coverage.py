"""How often do the 99 % intervals of honesty and entropy drift miss? On sequences drawn from known distributions.

    python benchmarks/coverage.py

The sum of each sequence is drawn from one distribution of mean zero times the root of its length; lengths are equal or
lognormal (σ 0.7). Through ``measure`` and ``compute``, as a window is. A few minutes on one core.
"""

import argparse
import math

import torch

from trl_parity.metrics.statistics import compute, measure
from trl_parity.records import ScoredBatch

LAWS = {
    "normal": lambda g, n: torch.randn(n, generator=g, dtype=torch.float64),
    "Student's t, 3 d.f.": lambda g, n: torch.distributions.StudentT(torch.tensor(3.0, dtype=torch.float64)).sample((n,)),
    "exponential": lambda g, n: torch.empty(n, dtype=torch.float64).exponential_(generator=g) - 1,
    "lognormal, σ 1": lambda g, n: torch.randn(n, generator=g, dtype=torch.float64).exp() - math.exp(0.5),
}


def window(sums: torch.Tensor, lengths: torch.Tensor) -> ScoredBatch:
    """Sequences whose Σ (H + rollout log-prob) are ``sums``."""
    columns = int(lengths.max())
    mask = torch.arange(columns) < lengths[:, None]
    logprobs = torch.full((len(sums), columns), -1.0, dtype=torch.float64)
    entropy = 1.0 + (sums / lengths)[:, None].expand(-1, columns)
    return ScoredBatch(
        mask=mask, rollout_logprobs=logprobs, trainer_logprobs=logprobs, own_logprobs=logprobs, entropy=entropy
    )


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2000)
    windows = parser.parse_args().windows
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    print("| sums of sequences | sequences | lengths | covered | width / of a normal sum's 99 % |")
    print("|---|---|---|---|---|")
    for name, draw in LAWS.items():
        for count in (8, 16, 64):
            for equal in (True, False):
                covered, width, true = 0, 0.0, 0.0
                for i in range(windows):
                    lengths = torch.full((count,), 32)
                    if not equal:
                        lengths = (32 * (0.7 * torch.randn(count, generator=generator)).exp()).long().clamp(min=1)
                    sums = draw(generator, count) * lengths.double().sqrt()
                    stats = compute(measure(window(sums, lengths), first_sequence=i * count))
                    covered += stats["entropy/drift_low"] <= 0 <= stats["entropy/drift_high"]
                    width += stats["entropy/drift_high"] - stats["entropy/drift_low"]
                    true += 2 * 2.576 * float((sums**2).sum().sqrt() / lengths.sum())
                print(
                    f"| {name} | {count} | {'equal' if equal else 'unequal'} | {covered / windows:.1%} | "
                    f"{width / true:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
