"""Tables of the attributes of Hugging Face configs: read, harmless, or harmless at some values.

They are collected from published checkpoints and from what transformers has written since version
2. An attribute that is in no table is refused, unless the user says to ignore it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qs_jax.config import RopeScaling

# Attributes that cannot change what the frozen model computes.
HARMLESS = frozenset(
    # Names and provenance.
    """
    _name_or_path _commit_hash _num_labels architectures auto_map author base_model
    base_model_name_or_path custom_pipelines description finetuning_task is_llama_config language
    license model_name model_type nemo_version prefix problem_type tags task_specific_params
    tokenizer_class tokenizer_name transformers.js_config transformers_version unsloth_fixed
    unsloth_version
    """.split()
    # Training: dropout, initialisation, memory, parallelism, regularisers.
    + """
    activation_dropout attention_dropout attention_probs_dropout_prob attn_dropout attn_pdrop
    classifier_dropout dropout embd_dropout embd_pdrop embed_dropout embedding_dropout fcm_max_ratio
    fcm_min_ratio ffn_dropout gradient_checkpointing hidden_dropout hidden_dropout_prob init_std
    initializer_factor initializer_range layerdrop loss_type mlp_dropout neftune_noise_alpha
    output_router_logits pretraining_tp remat_attention remat_block remat_mlp resid_dropout
    resid_pdrop router_aux_loss_coef router_z_loss_coef scan_attention scan_key_chunk_size
    scan_layers scan_mlp scan_mlp_chunk_size scan_query_chunk_size sequence_parallel tensor_parallel
    training_seq_length use_scan z_loss z_loss_weight
    """.split()
    # How an implementation computes the same thing.
    + """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation _flash_attn_2_enabled attn_impl attn_implementation base_model_ep_plan
    base_model_pp_plan base_model_tp_plan chunk_size_feed_forward dtype flash_attention fused_mlp
    fused_norm tf_legacy_loss torch_dtype torchscript use_bfloat16 use_cache use_flash_attention
    use_flash_attention_2 use_flash_attn use_flash_rotary use_fused_mlp use_fused_rms_norm
    use_fused_rope use_fused_swiglu use_liger_kernel use_mems_eval use_sdpa use_triton xla_device
    """.split()
    # Lengths that repeat the number of positions or say how a run was set up; padded vocabularies.
    + """
    context_length make_vocab_size_divisible_by max_length max_seq_len max_seq_length
    max_sequence_length max_window_layers model_max_length multiple_of n_ctx
    pad_vocab_size_multiple padded_vocab_size seq_len seq_length sequence_length
    """.split()
    # Heads of GPT-2's relatives, and bookkeeping of the configuration class.
    + """
    decoder_start_token_id id2label is_decoder label2id n_special num_labels output_attentions
    output_hidden_states output_past predict_special_tokens return_dict summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj tie_word_embeddings
    use_return_dict
    """.split()
    # Special tokens and generation, which run-time settings decide here.
    + """
    additional_special_tokens bad_words_ids begin_suppress_tokens bos_token bos_token_id
    cache_implementation cls_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size eos_ids eos_token eos_token_id eos_token_ids epsilon_cutoff
    eta_cutoff exponential_decay_length_penalty force_words_ids forced_bos_token_id
    forced_eos_token_id guidance_scale length_penalty mask_token_id max_new_tokens min_length
    min_new_tokens min_p no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores pad_token pad_token_id penalty_alpha remove_invalid_values renormalize_logits
    repetition_penalty return_dict_in_generate sep_token_id suppress_tokens temperature top_k top_p
    typical_p unk_token unk_token_id
    """.split()
)
# These change the computation at any other value. null stands for "not set" everywhere, and a list
# of equal entries for its entry.
_HARMLESS_AT: dict[str, tuple[Any, ...]] = {
    "adapters": ({}, {"adapters": {}, "config_map": {}, "fusion_config_map": {}, "fusions": {}}),
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attn_logit_softcapping": (),
    "bias": (False,),
    "clip_qkv": (),
    "compression_config": (),
    "cross_attention_hidden_size": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "interleaved": (False,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "layer_sharing": (False,),
    "layer_types": ("full_attention",),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "moe": (False,),
    "multi_query": (False,),
    "mup": (False,),
    "no_bias": (True,),
    "num_experts": (0, 1),
    "num_experts_per_tok": (0, 1),
    "num_local_experts": (0, 1),
    "num_nextn_predict_layers": (0,),
    "original_max_position_embeddings": (),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "qkv_bias": (False,),
    "quantization": (),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "scale_emb": (1,),
    "sliding_window": (),
    "sliding_window_pattern": (),
    "tie_encoder_decoder": (False,),
    "transformers_weights": (),
    "use_alibi": (False,),
    "use_bias": (False,),
    "use_mup": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_qkv_bias": (False,),
    "use_sliding_window": (False,),
}
# Metadata of GGUF files that no config has a name for.
_GGUF = """
    attention.causal attention.clamp_kqv attention.key_length attention.max_alibi_bias
    attention.scale attention.sliding_window attention.sliding_window_pattern
    attention.value_length embedding_scale expert_count expert_used_count logit_scale
    residual_scale rope.dimension_count rope.scale_linear rope.scaling.attn_factor
    rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    rope.scaling.yarn_ext_factor rope.scaling.yarn_log_multiplier tensor_data_layout
    use_parallel_residual
    """.split()
_ROTARY = _HARMLESS_AT | {
    "position_embedding_type": ("rope", "rotary"),
    "rms_norm": (True,),
    "use_rotary": (True,),
}
_NO_BIASES: dict[str, tuple[Any, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
_QKV_BIASES: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("attention_bias", "qkv_bias", "use_qkv_bias"), (True,)
)
HARMLESS_AT = {
    "gpt2": _HARMLESS_AT
    | {
        "bias": (True,),
        "no_bias": (False,),
        "position_embedding_type": ("absolute", "learned"),
        "qkv_bias": (True,),
        "reorder_and_upcast_attn": (False, True),  # softmax is float32 here in any case
        "rms_norm": (False,),
        "rope_scaling": (),
        "scale_attn_by_inverse_layer_idx": (False,),
        "scale_attn_weights": (True,),
        "use_bias": (True,),
        "use_rotary": (False,),
    },
    "llama": _ROTARY | {f"llama.{name}": () for name in _GGUF},
    "mistral": _ROTARY | _NO_BIASES,
    "qwen2": _ROTARY | _NO_BIASES | _QKV_BIASES | {f"qwen2.{name}": () for name in _GGUF},
    "qwen3": _ROTARY
    | {f"qwen3.{name}": () for name in _GGUF}
    | {"mlp_bias": (False,), "qk_layernorm": (True,), "qk_norm": (True,), "use_qk_norm": (True,)},
}
HARMLESS_AT["gpt2"] |= {f"gpt2.{name}": () for name in _GGUF}
# Settings of a sliding window: which names a family reads, and their types.
_QWEN_WINDOW: dict[str, tuple[type, ...]] = {
    "sliding_window": (int, type(None)),
    "use_sliding_window": (bool,),
    "max_window_layers": (int,),
    "layer_types": (list,),
}
WINDOW = {
    "mistral": {"sliding_window": (int, type(None))},
    "qwen2": _QWEN_WINDOW,
    "qwen3": _QWEN_WINDOW,
}
for _kind, _read in WINDOW.items():
    for _name in _read:
        HARMLESS_AT[_kind].pop(_name, None)
# Attributes that become a field: its name, its types, and the default of the Hugging Face class
# (... where there is none, None where the sizes decide). null stands for the default.
INT, NUMBER, BOOL, STR = (int,), (int, float), (bool,), (str,)
_NULL = (int, type(None))  # where null is not the default, but what the sizes say
_LLAMA: dict[str, tuple[str, tuple[type, ...], Any]] = {
    "vocab_size": ("vocab_size", INT, ...),
    "num_hidden_layers": ("num_layers", INT, ...),
    "hidden_size": ("hidden_size", INT, ...),
    "num_attention_heads": ("num_heads", INT, ...),
    "intermediate_size": ("mlp_size", INT, ...),
    "num_key_value_heads": ("num_kv_heads", _NULL, None),
    "head_dim": ("head_dim", INT, None),
    "max_position_embeddings": ("max_positions", INT, 2048),
    "rms_norm_eps": ("norm_eps", NUMBER, 1e-6),
    "hidden_act": ("activation", STR, "silu"),
    "tie_word_embeddings": ("tie_embeddings", BOOL, False),
}
_QWEN = _LLAMA | {
    "num_key_value_heads": ("num_kv_heads", _NULL, 32),
    "max_position_embeddings": ("max_positions", INT, 32768),
}
READ: dict[str, dict[str, tuple[str, tuple[type, ...], Any]]] = {
    "gpt2": {
        "vocab_size": ("vocab_size", INT, ...),
        "n_layer": ("num_layers", INT, ...),
        "n_embd": ("hidden_size", INT, ...),
        "n_head": ("num_heads", INT, ...),
        "n_inner": ("mlp_size", INT, None),
        "n_positions": ("max_positions", INT, 1024),
        "layer_norm_epsilon": ("norm_eps", NUMBER, 1e-5),
        "activation_function": ("activation", STR, "gelu_new"),
        "tie_word_embeddings": ("tie_embeddings", BOOL, True),
    },
    "llama": _LLAMA
    | {
        "attention_bias": ("attention_bias", BOOL, False),
        "mlp_bias": ("mlp_bias", BOOL, False),
    },
    "mistral": _LLAMA
    | {
        "num_key_value_heads": ("num_kv_heads", _NULL, 8),
        "max_position_embeddings": ("max_positions", INT, 4096 * 32),
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN
    | {
        "head_dim": ("head_dim", INT, 128),
        "attention_bias": ("attention_bias", BOOL, False),
    },
}
# Fields that no attribute says.
FIXED: dict[str, dict[str, bool]] = {
    "gpt2": {"attention_bias": True, "mlp_bias": True},
    "llama": {},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": False, "mlp_bias": False, "qkv_bias": True},
    "qwen3": {"mlp_bias": False, "qk_norm": True},
}
# Families that people ask for, and what ours lack for them.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("gemma2", "gemma3", "gemma3_text"),
        "it caps logits or norms twice around a sublayer, and its layers take turns between two "
        "windows and two RoPE bases",
    ),
    "gemma": "it scales embeddings, and adds 1 to the weights of norms",
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "llama4", "gpt_oss", "deepseek_v2", "deepseek_v3"),
        "its MLPs are experts among which a router chooses",
    ),
    "phi3": "it rotates a part of each head, and stores projections fused",
    "phi": "attention and MLP run side by side",
    "gpt_neox": "attention and MLP run side by side",
    "gptj": "attention and MLP run side by side",
    "falcon": "attention and MLP run side by side",
    "bloom": "its positions are ALiBi's",
    "mpt": "its positions are ALiBi's",
    "opt": "its positions are offset, and some sizes norm after each sublayer",
    "gpt_neo": "its layers take turns between global and local attention",
    "gpt_bigcode": "it has one key/value head in GPT-2's layout",
    "cohere": "attention and MLP run side by side",
    "olmo2": "it norms after each sublayer",
    "smollm3": "some layers have no RoPE",
    "qwen2_vl": "it reads pictures",
    "mamba": "it has no attention",
}
# Second names that the Hugging Face classes read.
ALIASES: dict[str, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
}
# Attributes with a rule of their own, and their types.
ROPE = {"rope_theta": NUMBER, "rope_scaling": (dict,), "rope_parameters": (dict,)}
TOKENS = {"bos_token_id": INT, "pad_token_id": INT, "eos_token_id": (int, list)}
# Settings of generation that change tokens and are not implemented, with the values at which they
# do not, besides null; those of the second table act where tokens are sampled.
GENERATION: dict[str, tuple[Any, ...]] = {
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
} | dict.fromkeys(
    """
    bad_words_ids begin_suppress_tokens constraints dola_layers exponential_decay_length_penalty
    force_words_ids forced_bos_token_id forced_eos_token_id sequence_bias stop_strings
    suppress_tokens watermarking_config
    """.split(),
    (),
)
SAMPLED: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "typical_p": (1,),
}
# Settings of a RoPE scaling: Hugging Face name -> field.
SCALING = {field.name: field.name for field in dataclasses.fields(RopeScaling)}
SCALING["original_max_position_embeddings"] = SCALING.pop("original_max_positions")
ROPE_HARMLESS_AT: dict[str, tuple[Any, ...]] = {
    "attn_factor": (1,),
    "extrapolation_factor": (1,),
    "finetuned": (False, True),
    "partial_rotary_factor": (1,),
}
