"""Where a preset hurts: semantic drift, error attribution, and what to protect (paper R).

`diagnose` compares a text under a preset with the dense model; `flag` marks tokens over a
threshold; `suggest_protect` names the ids to leave alone, and `protected` makes the call that does.
"""

from qs_jax.diagnostics.diagnosis import Diagnosis, diagnose
from qs_jax.diagnostics.protect import Flags, Suspect, describe, flag, protected, suggest_protect

__all__ = [
    "Diagnosis",
    "Flags",
    "Suspect",
    "describe",
    "diagnose",
    "flag",
    "protected",
    "suggest_protect",
]
