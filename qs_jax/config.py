"""Frozen configuration: what a model is (`ModelConfig`) and what a call should do (`Config`).

Everything here is hashable and therefore static to `jax.jit`, except the sampling numbers of
`Config`, which the engines pass on as arrays so that a sweep over them compiles once.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any, no_type_check

from qs_jax.errors import ConfigError

# What each RoPE scaling needs besides its factor.
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("original_max_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_positions",),
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _as_integer(name: str, value: Any) -> int | None:
    """An int of anything that is one (NumPy scalars too)."""
    try:
        return None if value is None else operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name} must be an integer, got {value!r}.") from error


def _as_float(name: str, value: Any) -> float | None:
    """A float of any number."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be a number, got {value!r}.") from error


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
        _require(
            self.rope_type in ROPE_SCALINGS,
            f"RoPE scaling {self.rope_type!r} is not implemented "
            f"(known: {', '.join(ROPE_SCALINGS)}).",
        )
        missing = [name for name in ROPE_SCALINGS[self.rope_type] if getattr(self, name) is None]
        _require(not missing, f"RoPE scaling {self.rope_type!r} needs {', '.join(missing)}.")
        _require(
            math.isfinite(self.factor) and self.factor >= 1.0,
            f"RoPE scaling factor must be a number >= 1, got {self.factor}.",
        )
        if self.low_freq_factor is not None and self.high_freq_factor is not None:
            _require(
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
      dtype: Of the parameters and of the residual stream. Norms, softmax and logits are float32.
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
            _require(value >= 1, f"{name} must be at least 1, got {value}.")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
            f"({self.num_kv_heads}).",
        )
        _require(self.norm_eps > 0, f"norm_eps must be positive, got {self.norm_eps}.")
        _require(
            self.dtype in ("float32", "bfloat16"),
            f"dtype {self.dtype!r} is not supported: float32 or bfloat16.",
        )
        if self.model_type == "llama":
            _require(
                self.rope_theta is not None and self.rope_theta > 0,
                f"a llama model needs a positive rope_theta, got {self.rope_theta}.",
            )
            _require(self.head_dim % 2 == 0, f"RoPE needs an even head_dim, got {self.head_dim}.")
        for name in ("bos_token_id", "pad_token_id"):
            self._check_token_id(name, getattr(self, name))
        for token in self.eos_token_ids:
            self._check_token_id("eos_token_ids", token)

    def _check_token_id(self, name: str, token: int | None) -> None:
        _require(
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


@dataclasses.dataclass(frozen=True)
class QuickSilverConfig:
    """Which mechanisms run. None has landed yet, so the only value is the dense model."""


@no_type_check  # it checks and converts what users give it itself
@dataclasses.dataclass(frozen=True)
class Config:
    """What one call of `generate`, `stream` or `score` should do.

    Attributes:
      model: Architecture, from `qs_jax.load`.
      quicksilver: Mechanisms, from `qs_jax.presets`; None is the dense model.
      max_new_tokens: Longest continuation of a row, in tokens.
      temperature: Divides the logits; 0 is greedy.
      top_k: Sample among the k most likely tokens only; None for all.
      top_p: Sample among the smallest set that holds this probability; None for all.
      repetition_penalty: Above 1 makes tokens of the prompt and continuation less likely
        (Keskar et al. 2019, the rule Hugging Face uses); 1 is off.
      seed: Row b of a batch draws from `fold_in(key(seed), b)`.
      eos_token_ids: Tokens that end a row; None takes the model's, () never stops.

    Raises:
      ConfigError: A value is outside its range.
    """

    model: ModelConfig
    quicksilver: QuickSilverConfig | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _require(
            isinstance(self.model, ModelConfig),
            f"model must be the ModelConfig that qs_jax.load returns, got {self.model!r}.",
        )
        _require(
            self.quicksilver is None or isinstance(self.quicksilver, QuickSilverConfig),
            f"quicksilver must come from qs_jax.presets, got {self.quicksilver!r}.",
        )
        for name in ("max_new_tokens", "top_k", "seed"):
            object.__setattr__(self, name, _as_integer(name, getattr(self, name)))
        for name in ("temperature", "top_p", "repetition_penalty"):
            object.__setattr__(self, name, _as_float(name, getattr(self, name)))
        if self.eos_token_ids is not None:
            given = self.eos_token_ids
            listed = given if isinstance(given, tuple | list) else [given]
            ids = tuple(_as_integer("eos_token_ids", token) for token in listed)
            object.__setattr__(self, "eos_token_ids", ids)
        _require(
            self.max_new_tokens >= 1,
            f"max_new_tokens must be at least 1, got {self.max_new_tokens}.",
        )
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature must be 0 (greedy) or positive, got {self.temperature}.",
        )
        _require(
            self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, got {self.top_k}."
        )
        _require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"top_p must be above 0 and at most 1, got {self.top_p}.",
        )
        _require(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            f"repetition_penalty must be positive, got {self.repetition_penalty}.",
        )
        _require(0 <= self.seed < 2**32, f"seed must be in [0, 2**32), got {self.seed}.")
        for token in self.eos_token_ids or ():
            _require(
                0 <= token < self.model.vocab_size,
                f"eos_token_ids holds {token}, outside the vocabulary of {self.model.vocab_size}.",
            )

    def replace(self, **changes: Any) -> Config:
        """A copy with `changes` applied and checked again."""
        return dataclasses.replace(self, **changes)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token ids that end a row of this call."""
        return self.model.eos_token_ids if self.eos_token_ids is None else self.eos_token_ids
