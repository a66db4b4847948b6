"""Runs as a pilot leaves them."""

import random

import torch

from trl_parity import ParityMonitor


def rewards_of(mean, n=32, spread=0.2, seed=0):
    rng = random.Random(f"{seed} {mean}")
    return [mean + rng.uniform(-spread, spread) for _ in range(n)]


def record(
    directory, steps=8, *, shift=0.0, shifted=lambda step: True, entropy=lambda step: 1.0, rewards=None, **settings
):
    """A run of one's own loop: 32 sequences of 16 tokens a step; the trainer is off by ``shift`` nats."""
    generator = torch.Generator().manual_seed(0)
    floor = {"kl_k3": 1e-6, "logp_abs_diff/mean": 1e-3}
    monitor = ParityMonitor(output_dir=directory, floor=floor, bootstrap_samples=50, **settings)
    for step in range(1, steps + 1):
        rollout = -torch.rand(32, 16, generator=generator)
        noise = 1e-3 * torch.randn(32, 16, generator=generator)
        trainer = rollout + noise - (shift if shifted(step) else 0.0)
        given = rewards_of(0.5, seed=step) if rewards is None else rewards(step)
        # with Monte Carlo entropy as the exact one: no drift of it
        monitor.log_step(
            step,
            rollout_logprobs=rollout * entropy(step),
            trainer_logprobs=trainer * entropy(step),
            entropy=torch.full((32, 16), -float((rollout * entropy(step)).mean())),
            rewards=given,
        )
    monitor.close()
    return directory
