"""Is this engine, with these settings, the transformers model? Trials, row by row."""
