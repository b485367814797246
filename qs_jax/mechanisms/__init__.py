"""The four mechanisms: static fields change the program, array leaves are what sweeps vary."""

from qs_jax.mechanisms.resolve import Mechanisms, Overrides, Rows, resolve

__all__ = ["Mechanisms", "Overrides", "Rows", "resolve"]
