"""Hugging Face `config.json` to `ModelConfig`, with every attribute accounted for.

Each attribute is read, harmless (it cannot change what the frozen model computes), harmless at
stated values, or refused by name; the tables are in `hf_attributes`. One that is unknown can be
ignored by name. Where one is absent, the default of the Hugging Face class holds.
RoPE settings are `rope_parameters` since version 5 of transformers, and were `rope_theta` and
`rope_scaling` before. Where a file has both they must agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any

from convert.errors import Problems
from convert.hf_attributes import (
    ALIASES,
    BOOL,
    FIXED,
    GENERATION,
    HARMLESS,
    HARMLESS_AT,
    INT,
    NUMBER,
    READ,
    REFUSED,
    ROPE,
    ROPE_HARMLESS_AT,
    SAMPLED,
    SCALING,
    STR,
    TOKENS,
    WINDOW,
)
from qs_jax.config import ROPE_SCALINGS, ModelConfig, RopeScaling, Sampling
from qs_jax.errors import ConfigError
from qs_jax.models import FAMILIES
from qs_jax.models.layers import ACTIVATIONS

HEADING = "config attributes"


def model_config(
    raw: dict[str, Any],
    dtype: str,
    problems: Problems,
    generation: dict[str, Any],
    ignored: Sequence[str] = (),
) -> tuple[ModelConfig | None, list[str]]:
    """Read a Hugging Face config.

    Args:
      raw: The parsed `config.json`.
      dtype: dtype the parameters will be stored in.
      problems: Receives everything that is unknown, refused, missing or contradictory.
      generation: The parsed `generation_config.json`; its end tokens win, as in Hugging Face, and
        it says how tokens are sampled.
      ignored: Unknown attributes that the user says change nothing.

    Returns:
      The configuration, or None if it could not be formed, and notes for the user.
    """
    kind, known = raw.get("model_type"), ", ".join(sorted(FAMILIES))
    try:
        if not isinstance(kind, str) or kind not in FAMILIES:
            reason = REFUSED.get(str(kind))
            why = f": {reason}" if reason else ""
            raise ConfigError(f"model_type {short(kind)} is not supported{why} (known: {known})")
        raw = _without_aliases(raw, kind, problems)
        notes = _check_attributes(raw, kind, ignored, problems)
        if not (fields := _read_fields(raw, kind, generation, problems)):
            return None, []
        fields["sliding_window"] = _window(raw, kind, fields["num_layers"], problems)
        if kind != "gpt2":
            try:
                fields |= _rope(raw, fields["max_positions"], problems)
            except ConfigError as error:  # which leaves the sizes to compare the tensors with
                problems.add(HEADING, str(error))
                fields["rope_theta"] = 1e4
        if (activation := fields["activation"]) not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(f"activation {activation!r} is not implemented (known: {known})")
        special, outside = _special_tokens(raw, generation, fields["vocab_size"])
        special["dtype"] = dtype
        special["generation"], undone = _sampling(generation or raw)
        return ModelConfig(kind, **fields, **special), notes + outside + undone
    except ConfigError as error:
        problems.add(HEADING, str(error))
        return None, []


def _read_fields(
    raw: dict[str, Any], kind: str, generation: dict[str, Any], problems: Problems
) -> dict[str, Any]:
    """Everything in `READ`; nothing if something is missing or of a wrong type."""
    rules = {name: types for name, (_, types, _) in READ[kind].items()} | ROPE | TOKENS
    rules |= WINDOW.get(kind, {})
    given = {name: (raw[name], types) for name, types in rules.items() if name in raw}
    for name, types in TOKENS.items():
        if generation.get(name) is not None:
            given[f"generation_config {name}"] = generation[name], types
    wrong = [
        f"{name} = {short(value)} must be {' or '.join(kind.__name__ for kind in types)}"
        for name, (value, types) in given.items()
        if not _has_type(value, types)
    ]
    needed = [name for name, (_, _, default) in READ[kind].items() if default is ...]
    wrong += [f"{name} is missing" for name in needed if name not in raw]
    problems.add(HEADING, *wrong)
    if wrong:
        return {}
    fields = {field: raw.get(name, other) for name, (field, _, other) in READ[kind].items()}
    hidden, heads = fields["hidden_size"], fields["num_heads"]
    if heads < 1 or (hidden % heads and fields.get("head_dim") is None):
        raise ConfigError(f"width {hidden} is not a multiple of the number of heads, {heads}")
    derived = {"num_kv_heads": heads, "head_dim": hidden // heads, "mlp_size": 4 * hidden}
    derived |= FIXED[kind]
    return derived | {field: value for field, value in fields.items() if value is not None}


def _has_type(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, list) and list in types:  # of names, unless numbers can stand alone
        return all(_has_type(item, INT if int in types else STR) for item in value)
    return isinstance(value, types) and (types == BOOL or not isinstance(value, bool))


def _without_aliases(raw: dict[str, Any], kind: str, problems: Problems) -> dict[str, Any]:
    """The attributes that are set, each under its first name; null sets some."""
    rules = {name: types for name, (_, types, _) in READ[kind].items()} | WINDOW.get(kind, {})
    nulls = [name for name, types in rules.items() if type(None) in types]
    raw = {name: value for name, value in raw.items() if value is not None or name in nulls}
    for alias, name in ALIASES.get(kind, {}).items():
        if alias in raw and raw.setdefault(name, raw[alias]) != raw.pop(alias):
            problems.add(HEADING, f"{alias} and {name} disagree")
    return raw


def _check_attributes(
    raw: dict[str, Any], kind: str, ignored: Sequence[str], problems: Problems
) -> list[str]:
    """Note every attribute that is unknown or not implemented; returns notes on ignored ones."""
    known, unknown = HARMLESS | set(READ[kind]) | set(ROPE if kind != "gpt2" else ()), []
    known |= set(WINDOW.get(kind, ()))
    for name in [name for name in raw if name not in known]:
        if name not in HARMLESS_AT[kind]:
            unknown.append(name)
        elif (name, raw.get("use_sliding_window")) == ("sliding_window", False):
            continue
        elif single(raw[name]) not in (*HARMLESS_AT[kind][name], None):
            problems.add(HEADING, f"{name} = {short(raw[name])} is not implemented")
    for name in [name for name in unknown if name not in ignored]:
        what = f"{name} = {short(raw[name])} is not known for {kind}"
        advice = f"convert.hf_to_flax --ignore-config {name} if it changes nothing"
        problems.add(HEADING, f"{what} ({advice})")
    for name in [name for name in ignored if name not in unknown]:
        problems.add(HEADING, f"--ignore-config {name}: only an unknown attribute can be ignored")
    return [f"{name} = {short(raw[name])} is ignored, as asked" for name in ignored if name in raw]


def _window(raw: dict[str, Any], kind: str, layers: int, problems: Problems) -> int | None:
    """The sliding window of all layers; layers that differ are refused."""
    if kind not in WINDOW:
        return None
    window = raw.get("sliding_window", 4096)
    if kind == "mistral":
        return window
    window = window if raw.get("use_sliding_window", False) else None
    whole = layers if window is None else min(max(raw.get("max_window_layers", 28), 0), layers)
    names, slides = raw.get("layer_types"), whole == 0
    if names is not None:
        slides = names.count("sliding_attention") == len(names) == layers
        whole = names.count("full_attention") if len(names) == layers else -1
        if slides and window is None:
            problems.add(HEADING, "layer_types name sliding_attention, but no window is in use")
    if not slides and whole != layers:
        what = "layers of different kinds (layer_types, max_window_layers)"
        problems.add(HEADING, f"{what} are not implemented")
    return window if slides else None


def single(value: Any) -> Any:
    """The one entry of a list of equal entries; any other value as it is."""
    return value[0] if isinstance(value, list) and value == value[:1] * len(value) != [] else value


def _special_tokens(
    raw: dict[str, Any], generation: dict[str, Any], vocab: int
) -> tuple[dict[str, Any], list[str]]:
    """Special ids that exist in the vocabulary; notes name those that do not."""
    ids, notes = {}, []
    for name in TOKENS:
        value = generation.get(name)
        value = raw.get(name, []) if value is None else value
        listed = value if isinstance(value, list) else [value]
        ids[name] = tuple(token for token in listed if 0 <= token < vocab)
        outside = [token for token in listed if token not in ids[name]]
        of = f"the vocabulary of {vocab} and is ignored"
        notes += [f"{name} {short(token)} is outside {of}" for token in outside]
    first = {name: next(iter(ids[name]), None) for name in ("bos_token_id", "pad_token_id")}
    return first | {"eos_token_ids": ids["eos_token_id"]}, notes


def _sampling(generation: dict[str, Any]) -> tuple[Sampling, list[str]]:
    """How a checkpoint is meant to be sampled, and notes on what is not done.

    As in Hugging Face: config.json says so only where there is no generation_config.json, without
    do_sample only the repetition penalty counts, and with it top_k is 50 unless it is given.
    """
    given = {name: value for name, value in generation.items() if value is not None}
    off, names, notes, sampling = GENERATION, ["repetition_penalty"], [], Sampling()
    if given.get("do_sample") is True:
        off, names = off | SAMPLED, [field.name for field in dataclasses.fields(Sampling)]
        if "top_k" not in given:
            notes.append("generation samples without a top_k; 50 is taken, as in Hugging Face")
        given = {"temperature": 1.0, "top_k": 50} | given
    for name in [name for name in names if name in given]:
        try:
            sampling = sampling.replace(**{name: given[name]})
        except ConfigError as error:
            notes.append(f"generation setting is ignored: {error}")
    for name in [name for name in off if given.get(name, []) not in (*off[name], [])]:
        what = f"generation setting {name} = {short(given[name])}"
        notes.append(f"{what} is not implemented and is ignored")
    return sampling, notes


def _rope(raw: dict[str, Any], max_positions: int, problems: Problems) -> dict[str, Any]:
    """The fields of the RoPE base and scaling."""
    spellings = [_normalised(raw[n]) for n in ("rope_parameters", "rope_scaling") if n in raw]
    thetas = [s.pop("rope_theta") for s in spellings if "rope_theta" in s]
    thetas += [raw["rope_theta"]] if "rope_theta" in raw else []
    if len(spellings) == 2 and spellings[0] != spellings[1]:
        problems.add(HEADING, "rope_parameters and rope_scaling disagree")
    if wrong := [theta for theta in thetas if not _has_type(theta, NUMBER)]:
        raise ConfigError(f"rope_theta = {short(wrong[0])} must be a number")
    if len(set(thetas)) > 1:
        problems.add(HEADING, f"rope_theta is given as {' and '.join(map(str, thetas))}")
    scaling = _scaling(spellings[0], max_positions, problems) if spellings else None
    return {"rope_theta": thetas[0] if thetas else 1e4, "rope_scaling": scaling}


def _normalised(rope: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings that say something, with the type under its one name."""
    harmless = ROPE_HARMLESS_AT
    rope = {name: v for name, v in rope.items() if v not in (*harmless.get(name, ()), None)}
    if "type" in rope and rope.get("rope_type", rope["type"]) == rope["type"]:
        rope["rope_type"] = rope.pop("type")
    if rope.get("rope_type") == "default" and rope.get("factor") == 1:
        del rope["factor"]
    return rope


def _scaling(rope: dict[str, Any], max_positions: int, problems: Problems) -> RopeScaling | None:
    """A scaling; `max_positions` stands in for a missing original length."""
    settings, wrong = dict(rope), []
    kind = settings.pop("rope_type", "default")
    if not isinstance(kind, str):
        raise ConfigError(f"rope_type = {short(kind)} must be str")
    for name, value in settings.items():
        if kind == "default" or name not in SCALING:
            where = f"for type {kind!r}" if "rope_type" in rope else "without a rope_type"
            wrong.append(f"RoPE setting {name} = {short(value)} is not known {where}")
        elif not (_has_type(value, NUMBER) or name == "truncate"):
            wrong.append(f"RoPE setting {name} = {short(value)} must be a number")
    problems.add(HEADING, *wrong)
    if wrong or kind == "default":
        return None
    # To Hugging Face a beta of 0 is one that is not set.
    unset = [name for name in ("beta_fast", "beta_slow") if settings.get(name) == 0]
    fields = {SCALING[name]: value for name, value in settings.items() if name not in unset}
    if kind in ("yarn", "llama3"):
        fields.setdefault("original_max_positions", max_positions)
    if kind == "yarn":
        fields.setdefault("factor", max_positions / max(fields["original_max_positions"], 1))
    if kind in ROPE_SCALINGS and "factor" not in fields:
        raise ConfigError(f"RoPE scaling {kind!r} needs factor")
    return RopeScaling(**({"rope_type": kind, "factor": 1.0} | fields))
