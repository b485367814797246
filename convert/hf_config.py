"""Hugging Face `config.json` to `ModelConfig`, with every attribute accounted for.

Each attribute is read, listed as harmless (it cannot change what the frozen model computes),
harmless only at stated values, or refused by name. A bias, a scaling or a window that this library
does not implement can therefore never be dropped silently. Where an attribute is absent, the
default of the Hugging Face class applies.

RoPE settings come in two spellings. Version 5 of transformers writes one `rope_parameters`; before
that there were `rope_theta` and `rope_scaling`. Where a file has both they must agree.
"""

from __future__ import annotations

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
_SIZES = {
    "gpt2": {
        "vocab_size": "vocab_size",
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_heads": "n_head",
    },
    "llama": {
        "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "mlp_size": "intermediate_size",
    },
}
_READ = {
    "gpt2": {"n_positions", "n_ctx", "n_inner", "activation_function", "layer_norm_epsilon"},
    "llama": {
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "attention_bias",
        "mlp_bias",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
    },
}
# Types of the attributes that are read; null stands for the default everywhere.
_INT, _FLOAT, _BOOL, _STR, _DICT = (int,), (int, float), (bool,), (str,), (dict,)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(["vocab_size", "n_positions", "n_ctx", "n_embd", "n_layer", "n_head"], _INT),
    **dict.fromkeys(["n_inner", "hidden_size", "intermediate_size", "num_hidden_layers"], _INT),
    **dict.fromkeys(["num_attention_heads", "num_key_value_heads", "head_dim"], _INT),
    **dict.fromkeys(["max_position_embeddings", "bos_token_id", "pad_token_id"], _INT),
    **dict.fromkeys(["layer_norm_epsilon", "rms_norm_eps", "rope_theta"], _FLOAT),
    **dict.fromkeys(["attention_bias", "mlp_bias", "tie_word_embeddings"], _BOOL),
    **dict.fromkeys(["activation_function", "hidden_act"], _STR),
    **dict.fromkeys(["rope_scaling", "rope_parameters"], _DICT),
    "eos_token_id": (int, list),
}
# RoPE scaling: Hugging Face name -> RopeScaling field.
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


def model_config(
    raw: dict[str, Any], dtype: str, problems: Problems, generation: dict[str, Any] | None = None
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
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        problems.add(HEADING, f"model_type {kind!r} is not supported (known: {known})")
        return None, []
    _check_attributes(raw, kind, problems)
    raw = {name: value for name, value in raw.items() if value is not None}
    required = _SIZES[kind].values()
    missing = [name for name in required if name not in raw]
    for name in missing:
        problems.add(HEADING, f"{name} is missing")
    if missing or not _check_types(raw, generation or {}, problems):
        return None, []
    fields: dict[str, Any] = {ours: raw[theirs] for ours, theirs in _SIZES[kind].items()}
    heads = fields["num_heads"]
    if heads < 1 or (fields["hidden_size"] % heads and "head_dim" not in raw):
        problems.add(
            HEADING,
            f"width {fields['hidden_size']} is not a multiple of the number of heads, {heads}",
        )
        return None, []
    fields |= _gpt2_fields(raw) if kind == "gpt2" else _llama_fields(raw, problems)
    if fields["activation"] not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        problems.add(
            HEADING, f"activation {fields['activation']!r} is not implemented (known: {known})"
        )
    special, notes = _special_tokens(raw, generation or {}, fields["vocab_size"])
    try:
        return ModelConfig(**({"model_type": kind, "dtype": dtype} | fields | special)), notes
    except ConfigError as error:
        problems.add(HEADING, str(error))
        return None, notes


def _check_attributes(raw: dict[str, Any], kind: str, problems: Problems) -> None:
    known = _HARMLESS | _READ[kind] | set(_SIZES[kind].values())
    for name, value in raw.items():
        if name in known:
            continue
        if name not in _HARMLESS_AT:
            problems.add(HEADING, f"{name} = {value!r} is not known for {kind}")
        elif value not in _HARMLESS_AT[name]:
            problems.add(HEADING, f"{name} = {value!r} is not implemented")
    if kind == "gpt2" and raw.get("n_ctx") not in (None, raw.get("n_positions", 1024)):
        problems.add(HEADING, f"n_ctx = {raw['n_ctx']} differs from n_positions")


def _check_types(raw: dict[str, Any], generation: dict[str, Any], problems: Problems) -> bool:
    """Whether every attribute that is read has a usable type."""
    given = raw | {f"generation_config {k}": v for k, v in generation.items() if v is not None}
    sound = True
    for name, value in given.items():
        expected = _TYPES.get(name.removeprefix("generation_config "))
        items = value if isinstance(value, list) and expected == (int, list) else [value]
        for item in items:
            if expected and (
                not isinstance(item, expected) or (isinstance(item, bool) and expected != _BOOL)
            ):
                kinds = " or ".join(kind.__name__ for kind in expected)
                problems.add(HEADING, f"{name} = {value!r} must be {kinds}")
                sound = False
    return sound


def _gpt2_fields(raw: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = raw["n_embd"], raw["n_head"]
    return {
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "mlp_size": raw.get("n_inner", 4 * hidden),
        "max_positions": raw.get("n_positions", 1024),
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "activation": raw.get("activation_function", "gelu_new"),
        "tie_embeddings": raw.get("tie_word_embeddings", True),
        "attention_bias": True,
        "mlp_bias": True,
    }


def _llama_fields(raw: dict[str, Any], problems: Problems) -> dict[str, Any]:
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    max_positions = raw.get("max_position_embeddings", 2048)
    theta, scaling = read_rope(raw, max_positions, problems)
    return {
        "num_kv_heads": raw.get("num_key_value_heads", heads),
        "head_dim": raw.get("head_dim", hidden // heads),
        "max_positions": max_positions,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "activation": raw.get("hidden_act", "silu"),
        "tie_embeddings": raw.get("tie_word_embeddings", False),
        "attention_bias": raw.get("attention_bias", False),
        "mlp_bias": raw.get("mlp_bias", False),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def _special_tokens(
    raw: dict[str, Any], generation: dict[str, Any], vocab: int
) -> tuple[dict[str, Any], list[str]]:
    """Special ids that exist in the vocabulary; notes name those that do not."""
    notes: list[str] = []

    def ids(name: str) -> tuple[int, ...]:
        value = generation.get(name)
        value = raw.get(name) if value is None else value
        listed = value if isinstance(value, list) else [] if value is None else [value]
        for token in listed:
            if not 0 <= token < vocab:
                notes.append(f"{name} {token} is outside the vocabulary of {vocab} and is ignored")
        return tuple(token for token in listed if 0 <= token < vocab)

    first = {name: next(iter(ids(name)), None) for name in ("bos_token_id", "pad_token_id")}
    return first | {"eos_token_ids": ids("eos_token_id")}, notes


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
