"""Why the two sides disagree: one cause undone at a time."""
