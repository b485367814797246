"""The architecture of a checkpoint. Hashable, and static to `jax.jit`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qs_jax.config.fields import Flag, Integer, Integers, Number, Positive, Settings
from qs_jax.errors import ConfigError

# What each RoPE scaling needs besides its factor.
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("original_max_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_positions",),
}


class RopeScaling(Settings, path="rope_scaling"):
    """How rotary frequencies are stretched beyond the length a model was first trained on.

    Attributes:
      rope_type: Rule, by the name Hugging Face configs use.
      factor: Stretch of the context length.
      original_max_positions: Trained length in tokens (`llama3`, `yarn`).
      low_freq_factor: `llama3`: wavelengths above original/low are stretched fully.
      high_freq_factor: `llama3`: wavelengths below original/high are left alone.
      beta_fast: `yarn`: rotations over the trained length above which nothing is stretched.
      beta_slow: `yarn`: rotations below which frequencies are stretched fully.
      attention_factor: `yarn`: multiplies cos and sin; None derives it from `factor`.
      mscale: `yarn`: see `attention_factor` in `qs_jax.models.rope`.
      mscale_all_dim: `yarn`: see `attention_factor` in `qs_jax.models.rope`.
      truncate: `yarn`: round the correction range to whole dimensions.

    Raises:
      ConfigError: A field the rule needs is missing or out of range.
    """

    rope_type: str
    factor: Annotated[Number, Field(ge=1, allow_inf_nan=False)]
    original_max_positions: Integer | None = None
    low_freq_factor: Number | None = None
    high_freq_factor: Number | None = None
    beta_fast: Number = 32.0
    beta_slow: Number = 1.0
    attention_factor: Number | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    truncate: Flag = True

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_SCALINGS:
            known = ", ".join(ROPE_SCALINGS)
            raise ConfigError(
                f"RoPE scaling {self.rope_type!r} is not implemented (known: {known})."
            )
        missing = [name for name in ROPE_SCALINGS[self.rope_type] if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"RoPE scaling {self.rope_type!r} needs {', '.join(missing)}.")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and not 0 < low < high:
            raise ConfigError(
                "llama3 RoPE scaling needs 0 < low_freq_factor < high_freq_factor, got "
                f"{low} and {high}."
            )


class ModelConfig(Settings):
    """The architecture of a frozen checkpoint; every size comes from the checkpoint itself.

    Attributes:
      model_type: Hugging Face `model_type`, the key of the block registry.
      vocab_size: V, number of token ids.
      num_layers: L.
      hidden_size: D, width of the residual stream.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; N is a multiple of K.
      head_dim: H, width of one head.
      mlp_size: F, inner width of the MLP.
      max_positions: Largest prompt + continuation, in tokens.
      norm_eps: Added to the variance in every norm.
      activation: MLP nonlinearity.
      tie_embeddings: The head reuses the token embedding.
      attention_bias: Projections of attention have biases.
      mlp_bias: Projections of the MLP have biases.
      rope_theta: RoPE base; None for learned positions.
      rope_scaling: RoPE stretch; None for plain RoPE.
      dtype: Of the parameters and of the residual stream. Norms, softmax and logits are float32,
        or float64 where this is.
      bos_token_id: First token of a document, if the model has one.
      eos_token_ids: Any of these ends a row.
      pad_token_id: Fills rows after their end; None means 0.

    Raises:
      ConfigError: Sizes do not fit each other.
    """

    model_type: str
    vocab_size: Positive
    num_layers: Positive
    hidden_size: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    mlp_size: Positive
    max_positions: Positive
    norm_eps: Annotated[Number, Field(gt=0)]
    activation: str
    tie_embeddings: Flag
    attention_bias: Flag
    mlp_bias: Flag
    rope_theta: Number | None = None
    rope_scaling: RopeScaling | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    bos_token_id: Integer | None = None
    eos_token_ids: Integers = ()
    pad_token_id: Integer | None = None

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            raise ConfigError(
                f"num_heads ({heads}) must be a multiple of num_kv_heads ({kv_heads})."
            )
        if self.model_type == "llama" and (self.rope_theta is None or self.rope_theta <= 0):
            raise ConfigError(f"a llama model needs a positive rope_theta, got {self.rope_theta}.")
        if self.model_type == "llama" and self.head_dim % 2:
            raise ConfigError(f"RoPE needs an even head_dim, got {self.head_dim}.")
        for name in ("bos_token_id", "pad_token_id", "eos_token_ids"):
            value = getattr(self, name)
            for token in value if isinstance(value, tuple) else (value,):
                if token is not None and not 0 <= token < self.vocab_size:
                    size = self.vocab_size
                    raise ConfigError(f"{name} {token} is outside the vocabulary of {size}.")

    @property
    def q_size(self) -> int:
        """Columns of the query projection, N * H."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key (or the value) projection, K * H."""
        return self.num_kv_heads * self.head_dim
