"""Before the first step: a reference, prompts, and trials of the engine against it and against itself."""
