"""Measurements; each is `python -m benchmarks.NAME` and writes JSON below `benchmarks/results/`."""
