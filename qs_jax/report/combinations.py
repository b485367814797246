"""Mechanisms switched on and off: which combinations a preset has, and what each one is.

The letters are the paper's (P): H halting, K KV skipping, F fusion, Q quantization.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp

from qs_jax.config import QuickSilverConfig
from qs_jax.mechanisms.plan import NEVER, Numbers

PARTS = {"H": "halting", "K": "kv_skip", "F": "fusion", "Q": "amq"}


def letters_of(qs: QuickSilverConfig) -> str:
    """The mechanisms that are on, in the order H, K, F, Q; "" is the dense model."""
    return "".join(letter for letter, part in PARTS.items() if getattr(qs, part) is not None)


def reduced(qs: QuickSilverConfig, letters: str) -> QuickSilverConfig:
    """The same settings with only some mechanisms on.

    Raises:
      ConfigError: They make no sense without the others.
    """
    off = {part: None for letter, part in PARTS.items() if letter not in letters}
    return dataclasses.replace(qs, **off)


def combinations(qs: QuickSilverConfig, all_of_them: bool = True) -> list[str]:
    """What can be switched on together, from the dense model "" to everything.

    KV skipping acts on halted tokens only, so it needs halting; halting that lets flagged tokens
    compute on (`freeze=False`) needs KV skipping.

    Args:
      qs: Everything that is on in the preset.
      all_of_them: False gives the dense model and the whole preset only.
    """
    own = letters_of(qs)
    if not all_of_them:
        return list(dict.fromkeys(["", own]))
    found = []
    for count in range(len(own) + 1):
        for chosen in itertools.combinations(own, count):
            letters = "".join(chosen)
            together = "K" in letters or qs.halting is None or qs.halting.freeze
            if ("H" in letters or "K" not in letters) and ("H" not in letters or together):
                found.append(letters)
    return found


def switched(numbers: Numbers, letters: str) -> Numbers:
    """Numbers under which a program runs as if the other mechanisms were off.

    No token may halt, fuse or get bits where they are; so one program serves all combinations that
    share a KV policy. Whether keys are skipped is in the program itself.

    Args:
      numbers: Of the whole preset.
      letters: What stays on.
    """
    layers = numbers.layers
    nowhere = jnp.zeros_like(layers.may_halt)
    if "H" not in letters:
        layers = layers._replace(may_halt=nowhere)
        numbers = numbers._replace(forced_layer=jnp.full_like(numbers.forced_layer, NEVER))
    if "F" not in letters:
        layers = layers._replace(may_fuse=nowhere)
    if "Q" not in letters:
        layers = layers._replace(assign_bits=nowhere, has_bits=nowhere)
    return numbers._replace(layers=layers)
