"""What the library does on one GPU, in one command of a few minutes."""
