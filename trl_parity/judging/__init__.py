"""From statistics to verdicts: pure, the same on every rank."""
