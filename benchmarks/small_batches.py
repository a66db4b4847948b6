"""How often is a healthy run of small batches warned about, breached or halted? Sampled from known laws, no engine.

    python benchmarks/small_batches.py                 # 2,400 windows of 8 and of 16 sequences: a minute
    python benchmarks/small_batches.py --windows 24000

Each sequence has a sharpness of its own and a length of its own, its tokens are drawn from laws over 128 words by
their very probabilities, and the trainer's logits differ by rounding alone. Runs of 240 windows through
``ParityMonitor``, with the entropy known: nothing is wrong in any of them.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch

from trl_parity import ParityMonitor

RUN, WORDS, LENGTH = 240, 128, 96  # windows of a run; vocabulary; most tokens of a sequence

NOISE = 0.01  # of a logit


def batch(generator: torch.Generator, sequences: int) -> dict[str, torch.Tensor]:
    """One rollout batch as ``log_step`` takes it."""
    sharpness = torch.randn(sequences, 1, 1, generator=generator).mul(0.7).exp()
    sharp = sharpness * torch.randn(sequences, LENGTH, 1, generator=generator).mul(0.7).exp()
    logits = 2.0 * sharp * torch.randn(sequences, LENGTH, WORDS, generator=generator)
    rollout = logits.double().log_softmax(-1)
    ids = torch.multinomial(rollout.exp().flatten(0, 1), 1, generator=generator).view(sequences, LENGTH, 1)
    noise = NOISE * torch.randn(logits.shape, generator=generator)
    trainer = (logits + noise).double().log_softmax(-1)
    lengths = (32 * torch.randn(sequences, generator=generator).mul(0.7).exp()).long().clamp(1, LENGTH)
    return {
        "rollout_logprobs": rollout.gather(-1, ids)[..., 0],
        "trainer_logprobs": trainer.gather(-1, ids)[..., 0],
        "entropy": -(trainer.exp() * trainer).sum(-1),
        "mask": torch.arange(LENGTH) < lengths[:, None],
    }


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2400)
    parser.add_argument("--sequences", type=int, nargs="+", default=[8, 16])
    options = parser.parse_args()
    for sequences in options.sequences:
        generator, statuses, by = torch.Generator().manual_seed(sequences), Counter(), Counter()
        for _ in range(options.windows // RUN):
            monitor = ParityMonitor(action="log")
            for step in range(1, RUN + 1):
                verdict = monitor.log_step(step, **batch(generator, sequences))
                statuses[str(verdict.status)] += 1
                by.update(f"{verdict.status} {stat}" for stat in (*verdict.breaches, *verdict.warnings))
        print(f"{sequences} sequences, {sum(statuses.values()):,} windows: {dict(statuses)}; {dict(by)}", flush=True)


if __name__ == "__main__":
    main()
