"""The architecture of a checkpoint. Hashable, and static to `jax.jit`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from qs_jax.config.checks import require
from qs_jax.errors import ConfigError

# What each RoPE scaling needs besides its factor.
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("original_max_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_positions",),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
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
    factor: float
    original_max_positions: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        require(
            self.rope_type in ROPE_SCALINGS,
            f"RoPE scaling {self.rope_type!r} is not implemented "
            f"(known: {', '.join(ROPE_SCALINGS)}).",
        )
        missing = [name for name in ROPE_SCALINGS[self.rope_type] if getattr(self, name) is None]
        require(not missing, f"RoPE scaling {self.rope_type!r} needs {', '.join(missing)}.")
        require(
            math.isfinite(self.factor) and self.factor >= 1.0,
            f"RoPE scaling factor must be a number >= 1, got {self.factor}.",
        )
        if self.low_freq_factor is not None and self.high_freq_factor is not None:
            require(
                0 < self.low_freq_factor < self.high_freq_factor,
                "llama3 RoPE scaling needs 0 < low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}.",
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
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
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_positions: int
    norm_eps: float
    activation: str
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in [
            "vocab_size",
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_size",
            "max_positions",
        ]:
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, got {value}.")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
            f"({self.num_kv_heads}).",
        )
        require(self.norm_eps > 0, f"norm_eps must be positive, got {self.norm_eps}.")
        require(
            self.dtype in ("float32", "bfloat16", "float64"),
            f"dtype {self.dtype!r} is not supported: float32 or bfloat16 (or float64, to check "
            "results, with jax_enable_x64).",
        )
        if self.model_type == "llama":
            require(
                self.rope_theta is not None and self.rope_theta > 0,
                f"a llama model needs a positive rope_theta, got {self.rope_theta}.",
            )
            require(self.head_dim % 2 == 0, f"RoPE needs an even head_dim, got {self.head_dim}.")
        for name in ("bos_token_id", "pad_token_id"):
            self._check_token_id(name, getattr(self, name))
        for token in self.eos_token_ids:
            self._check_token_id("eos_token_ids", token)

    def _check_token_id(self, name: str, token: int | None) -> None:
        require(
            token is None or 0 <= token < self.vocab_size,
            f"{name} {token} is outside the vocabulary of {self.vocab_size}.",
        )

    @property
    def q_size(self) -> int:
        """Columns of the query projection, N * H."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key (or the value) projection, K * H."""
        return self.num_kv_heads * self.head_dim

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with `changes` applied and checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the inverse."""
        return dataclasses.asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`.

        Raises:
          ConfigError: Unknown or missing fields, or values that do not fit.
        """
        try:
            fields = dict(fields)
            if fields.get("rope_scaling") is not None:
                fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
            fields["eos_token_ids"] = tuple(fields.get("eos_token_ids", ()))
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"not a model configuration: {error}") from error
