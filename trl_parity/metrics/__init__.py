"""Numbers in, numbers out: sums over tokens, the statistics made of them, and one reduction a window."""
