"""`python -m qs_jax`."""

import sys

from qs_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
