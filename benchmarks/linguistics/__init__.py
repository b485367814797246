"""Which words halt, which fuse, and what it does to predictions (paper Tables 2, 9, 12, 13; L)."""
