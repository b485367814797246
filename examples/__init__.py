"""Short scripts, one task each: `python -m examples.NAME --help`."""
