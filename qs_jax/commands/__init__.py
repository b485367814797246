"""Commands of `python -m qs_jax`, one file each."""
