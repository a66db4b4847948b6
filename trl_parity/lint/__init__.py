"""Settings judged before anything runs."""
