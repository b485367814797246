"""The command line of lm-evaluation-harness with the model `qs-jax`: `python -m qs_jax.lm_eval`.

Releases of the harness up to 0.4.13 know the models in their own package only; later ones find
`qs-jax` by its entry point, and `lm_eval --model qs-jax` is the same. All options are the
harness's.
"""

from __future__ import annotations

import sys

from qs_jax.compilation_cache import enable_compilation_cache
from qs_jax.errors import exit_code


def main() -> int:
    """Register the model and hand over; returns the exit code."""
    enable_compilation_cache()

    def run() -> None:
        import qs_jax.evaluation.lm_eval_adapter  # noqa: F401  # registers the model

        from lm_eval.__main__ import cli_evaluate  # isort: skip

        cli_evaluate()

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
