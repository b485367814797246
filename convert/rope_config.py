"""The RoPE settings of a Hugging Face config, in either of the two spellings they come in.

Version 5 of transformers writes one `rope_parameters`; before that there were `rope_theta` and
`rope_scaling`. Where a file has both they must agree.
"""

from __future__ import annotations

from typing import Any

from convert.errors import Problems
from qs_jax.config import ROPE_SCALINGS, RopeScaling
from qs_jax.errors import ConfigError

HEADING = "config attributes"

# Hugging Face name -> RopeScaling field.
_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}


def read_rope(
    raw: dict[str, Any], max_positions: int, problems: Problems
) -> tuple[float, RopeScaling | None]:
    """The RoPE base and scaling.

    Args:
      raw: The config, without nulls.
      max_positions: Stands in for a missing original length (`llama3`, `yarn`).
      problems: Receives settings that are unknown, refused, missing or contradictory.

    Returns:
      The base, and the scaling or None.
    """
    spellings = [_normalised(raw[n]) for n in ("rope_parameters", "rope_scaling") if n in raw]
    rope = spellings[0] if spellings else {}
    thetas = [s.pop("rope_theta") for s in spellings if "rope_theta" in s]
    if len(spellings) == 2 and spellings[0] != spellings[1]:
        problems.add(HEADING, "rope_parameters and rope_scaling disagree")
    thetas += [raw["rope_theta"]] if "rope_theta" in raw else []
    if len({float(theta) for theta in thetas if _is_number(theta)}) > 1:
        problems.add(HEADING, f"rope_theta is given as {' and '.join(map(str, thetas))}")
    theta = thetas[0] if thetas else 10000.0
    if not _is_number(theta):
        problems.add(HEADING, f"rope_theta = {theta!r} must be a number")
        return 10000.0, None
    return float(theta), _scaling(rope, max_positions, problems)


def _normalised(rope: dict[str, Any]) -> dict[str, Any]:
    """Without nulls, and with the type under its one name."""
    rope = {name: value for name, value in rope.items() if value is not None}
    if "type" in rope and rope.get("rope_type", rope["type"]) == rope["type"]:
        rope["rope_type"] = rope.pop("type")
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    return rope


def _scaling(rope: dict[str, Any], max_positions: int, problems: Problems) -> RopeScaling | None:
    kind = rope.get("rope_type", "default")
    settings = {name: value for name, value in rope.items() if name != "rope_type"}
    unknown = [name for name in settings if name not in _FIELDS or kind == "default"]
    for name in unknown:
        where = "without a rope_type" if "rope_type" not in rope else f"for type {kind!r}"
        problems.add(HEADING, f"RoPE setting {name} = {settings[name]!r} is not known {where}")
    wrong = [
        name
        for name, value in settings.items()
        if name not in unknown and not (_is_number(value) or name == "truncate")
    ]
    for name in wrong:
        problems.add(HEADING, f"RoPE setting {name} = {settings[name]!r} must be a number")
    if kind == "default" or unknown or wrong:
        return None
    fields: dict[str, Any] = {_FIELDS[name]: value for name, value in settings.items()}
    if kind in ("yarn", "llama3"):
        fields.setdefault("original_max_positions", max_positions)
    if kind == "yarn":
        fields.setdefault("factor", max_positions / fields["original_max_positions"])
    if kind in ROPE_SCALINGS and "factor" not in fields:
        problems.add(HEADING, f"RoPE scaling {kind!r} needs factor")
        return None
    try:
        return RopeScaling(**({"rope_type": kind, "factor": 1.0} | fields))
    except ConfigError as error:
        problems.add(HEADING, str(error))
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
