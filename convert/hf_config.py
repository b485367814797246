"""Hugging Face `config.json` to `ModelConfig`, with every attribute accounted for.

Each attribute is read, harmless (it cannot change what the frozen model computes), harmless at
stated values, or refused by name. Where one is absent, the default of the Hugging Face class holds.
RoPE settings are `rope_parameters` since version 5 of transformers, and were `rope_theta` and
`rope_scaling` before. Where a file has both they must agree.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.errors import Problems
from qs_jax.config import ROPE_SCALINGS, ModelConfig, RopeScaling
from qs_jax.errors import ConfigError
from qs_jax.models import FAMILIES
from qs_jax.models.layers import ACTIVATIONS

HEADING = "config attributes"
# Bookkeeping, training-only settings and generation defaults, common to all models.
_HARMLESS = frozenset(
    """
    _name_or_path _attn_implementation _attn_implementation_autoset architectures auto_map
    attention_dropout attn_pdrop embd_pdrop resid_pdrop classifier_dropout dtype torch_dtype
    initializer_range model_type transformers_version use_cache use_bfloat16 tf_legacy_loss
    torchscript bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    finetuning_task id2label label2id num_labels problem_type task_specific_params
    tokenizer_class prefix return_dict return_dict_in_generate output_attentions
    output_hidden_states output_scores chunk_size_feed_forward pretraining_tp
    tie_word_embeddings gradient_checkpointing is_decoder summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens is_llama_config _commit_hash unsloth_version unsloth_fixed
    """.split()
)
# These would change the computation at any other value.
_HARMLESS_AT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "layer_types": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "scale_attn_weights": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "reorder_and_upcast_attn": (False, True, None),  # softmax is float32 here in any case
}
# Attributes that become a field: its name, its types, and the default of the Hugging Face class
# (... where there is none, None where the sizes decide). null stands for the default.
_INT, _NUMBER, _BOOL, _STR = (int,), (int, float), (bool,), (str,)
_READ: dict[str, dict[str, tuple[str, tuple[type, ...], Any]]] = {
    "gpt2": {
        "vocab_size": ("vocab_size", _INT, ...),
        "n_layer": ("num_layers", _INT, ...),
        "n_embd": ("hidden_size", _INT, ...),
        "n_head": ("num_heads", _INT, ...),
        "n_inner": ("mlp_size", _INT, None),
        "n_positions": ("max_positions", _INT, 1024),
        "layer_norm_epsilon": ("norm_eps", _NUMBER, 1e-5),
        "activation_function": ("activation", _STR, "gelu_new"),
        "tie_word_embeddings": ("tie_embeddings", _BOOL, True),
    },
    "llama": {
        "vocab_size": ("vocab_size", _INT, ...),
        "num_hidden_layers": ("num_layers", _INT, ...),
        "hidden_size": ("hidden_size", _INT, ...),
        "num_attention_heads": ("num_heads", _INT, ...),
        "intermediate_size": ("mlp_size", _INT, ...),
        "num_key_value_heads": ("num_kv_heads", _INT, None),
        "head_dim": ("head_dim", _INT, None),
        "max_position_embeddings": ("max_positions", _INT, 2048),
        "rms_norm_eps": ("norm_eps", _NUMBER, 1e-6),
        "hidden_act": ("activation", _STR, "silu"),
        "tie_word_embeddings": ("tie_embeddings", _BOOL, False),
        "attention_bias": ("attention_bias", _BOOL, False),
        "mlp_bias": ("mlp_bias", _BOOL, False),
    },
}
# Attributes with a rule of their own, and their types.
_ROPE = {"rope_theta": _NUMBER, "rope_scaling": (dict,), "rope_parameters": (dict,)}
_TOKENS = {"bos_token_id": _INT, "pad_token_id": _INT, "eos_token_id": (int, list)}
# Settings of a RoPE scaling: Hugging Face name -> field.
_SCALING = {field.name: field.name for field in dataclasses.fields(RopeScaling)}
_SCALING["original_max_position_embeddings"] = _SCALING.pop("original_max_positions")


def model_config(
    raw: dict[str, Any], dtype: str, problems: Problems, generation: dict[str, Any]
) -> tuple[ModelConfig | None, list[str]]:
    """Read a Hugging Face config.

    Args:
      raw: The parsed `config.json`.
      dtype: dtype the parameters will be stored in.
      problems: Receives everything that is unknown, refused, missing or contradictory.
      generation: The parsed `generation_config.json`; its end tokens win, as in Hugging Face.

    Returns:
      The configuration, or None if it could not be formed, and notes for the user.
    """
    kind, known = raw.get("model_type"), ", ".join(sorted(FAMILIES))
    try:
        if kind not in FAMILIES:
            raise ConfigError(f"model_type {kind!r} is not supported (known: {known})")
        _check_attributes(raw, kind, problems)
        raw = {name: value for name, value in raw.items() if value is not None}
        if not (fields := _read_fields(raw, kind, generation, problems)):
            return None, []
        if kind == "llama":
            try:
                fields |= _rope(raw, fields["max_positions"], problems)
            except ConfigError as error:  # which leaves the sizes to compare the tensors with
                problems.add(HEADING, str(error))
                fields["rope_theta"] = 1e4
        if (activation := fields["activation"]) not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(f"activation {activation!r} is not implemented (known: {known})")
        special, notes = _special_tokens(raw, generation, fields["vocab_size"])
        special["dtype"] = dtype
        return ModelConfig(kind, **fields, **special), notes
    except ConfigError as error:
        problems.add(HEADING, str(error))
        return None, []


def _read_fields(
    raw: dict[str, Any], kind: str, generation: dict[str, Any], problems: Problems
) -> dict[str, Any]:
    """Everything in `_READ`; nothing if something is missing or of a wrong type."""
    rules = {name: types for name, (_, types, _) in _READ[kind].items()} | _ROPE | _TOKENS
    given = {name: (raw[name], types) for name, types in rules.items() if name in raw}
    for name, types in _TOKENS.items():
        if generation.get(name) is not None:
            given[f"generation_config {name}"] = generation[name], types
    wrong = [
        f"{name} = {value!r} must be {' or '.join(kind.__name__ for kind in types)}"
        for name, (value, types) in given.items()
        if not _has_type(value, types)
    ]
    needed = [name for name, (_, _, default) in _READ[kind].items() if default is ...]
    wrong += [f"{name} is missing" for name in needed if name not in raw]
    problems.add(HEADING, *wrong)
    if wrong:
        return {}
    fields = {field: raw.get(name, other) for name, (field, _, other) in _READ[kind].items()}
    hidden, heads = fields["hidden_size"], fields["num_heads"]
    if heads < 1 or (hidden % heads and fields.get("head_dim") is None):
        raise ConfigError(f"width {hidden} is not a multiple of the number of heads, {heads}")
    derived = {"num_kv_heads": heads, "head_dim": hidden // heads, "mlp_size": 4 * hidden}
    if kind == "gpt2":
        derived |= {"attention_bias": True, "mlp_bias": True}
    return derived | {field: value for field, value in fields.items() if value is not None}


def _has_type(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, list) and list in types:
        return all(_has_type(item, _INT) for item in value)
    return isinstance(value, types) and (types == _BOOL or not isinstance(value, bool))


def _check_attributes(raw: dict[str, Any], kind: str, problems: Problems) -> None:
    known = _HARMLESS | set(_READ[kind]) | set(_ROPE if kind == "llama" else ())
    harmless_at = dict(_HARMLESS_AT)
    if kind == "gpt2":
        harmless_at["n_ctx"] = (None, raw.get("n_positions", 1024))
    for name in [name for name in raw if name not in known]:
        if name not in harmless_at:
            problems.add(HEADING, f"{name} = {raw[name]!r} is not known for {kind}")
        elif raw[name] not in harmless_at[name]:
            problems.add(HEADING, f"{name} = {raw[name]!r} is not implemented")


def _special_tokens(
    raw: dict[str, Any], generation: dict[str, Any], vocab: int
) -> tuple[dict[str, Any], list[str]]:
    """Special ids that exist in the vocabulary; notes name those that do not."""
    ids, notes = {}, []
    for name in _TOKENS:
        value = generation.get(name)
        value = raw.get(name, []) if value is None else value
        listed = value if isinstance(value, list) else [value]
        ids[name] = tuple(token for token in listed if 0 <= token < vocab)
        outside = [token for token in listed if token not in ids[name]]
        of = f"the vocabulary of {vocab} and is ignored"
        notes += [f"{name} {token} is outside {of}" for token in outside]
    first = {name: next(iter(ids[name]), None) for name in ("bos_token_id", "pad_token_id")}
    return first | {"eos_token_ids": ids["eos_token_id"]}, notes


def _rope(raw: dict[str, Any], max_positions: int, problems: Problems) -> dict[str, Any]:
    """The fields of the RoPE base and scaling."""
    spellings = [_normalised(raw[n]) for n in ("rope_parameters", "rope_scaling") if n in raw]
    thetas = [s.pop("rope_theta") for s in spellings if "rope_theta" in s]
    thetas += [raw["rope_theta"]] if "rope_theta" in raw else []
    if len(spellings) == 2 and spellings[0] != spellings[1]:
        problems.add(HEADING, "rope_parameters and rope_scaling disagree")
    if wrong := [theta for theta in thetas if not _has_type(theta, _NUMBER)]:
        raise ConfigError(f"rope_theta = {wrong[0]!r} must be a number")
    if len(set(thetas)) > 1:
        problems.add(HEADING, f"rope_theta is given as {' and '.join(map(str, thetas))}")
    scaling = _scaling(spellings[0], max_positions, problems) if spellings else None
    return {"rope_theta": float(thetas[0]) if thetas else 1e4, "rope_scaling": scaling}


def _normalised(rope: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings without nulls, and with the type under its one name."""
    rope = {name: value for name, value in rope.items() if value is not None}
    if "type" in rope and rope.get("rope_type", rope["type"]) == rope["type"]:
        rope["rope_type"] = rope.pop("type")
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    return rope


def _scaling(rope: dict[str, Any], max_positions: int, problems: Problems) -> RopeScaling | None:
    """A scaling; `max_positions` stands in for a missing original length."""
    settings, wrong = dict(rope), []
    kind = settings.pop("rope_type", "default")
    for name, value in settings.items():
        if kind == "default" or name not in _SCALING:
            where = f"for type {kind!r}" if "rope_type" in rope else "without a rope_type"
            wrong.append(f"RoPE setting {name} = {value!r} is not known {where}")
        elif not (_has_type(value, _NUMBER) or name == "truncate"):
            wrong.append(f"RoPE setting {name} = {value!r} must be a number")
    problems.add(HEADING, *wrong)
    if wrong or kind == "default":
        return None
    fields = {_SCALING[name]: value for name, value in settings.items()}
    if kind in ("yarn", "llama3"):
        fields.setdefault("original_max_positions", max_positions)
    if kind == "yarn":
        fields.setdefault("factor", max_positions / fields["original_max_positions"])
    if kind in ROPE_SCALINGS and "factor" not in fields:
        raise ConfigError(f"RoPE scaling {kind!r} needs factor")
    return RopeScaling(**({"rope_type": kind, "factor": 1.0} | fields))
