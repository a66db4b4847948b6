"""The trainer's log-probs: its head in fp32, the engine's sampling replayed, a pass perturbed."""
