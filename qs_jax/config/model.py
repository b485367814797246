"""The architecture of a checkpoint. Hashable, and static to `jax.jit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from qs_jax.config.fields import (
    Above0,
    Count,
    Flag,
    Integer,
    Integers,
    NonNegative,
    Number,
    Probability,
    Ratio,
    Settings,
)
from qs_jax.errors import ConfigError

# Bounds above every published model: shapes and angles can be formed before they are compared.
Size = Annotated[Integer, Field(ge=1, le=2**24)]
Layers = Annotated[Integer, Field(ge=1, le=10_000)]
Length = Annotated[Integer, Field(ge=1, lt=2**31)]
PositiveNumber = Annotated[Number, Field(gt=0, le=1e6)]
Weight = Annotated[Number, Field(ge=0, le=1e6)]
# What each RoPE scaling needs besides its factor.
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("original_max_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_positions",),
}


class RopeScaling(Settings, path="rope_scaling"):
    """How rotary frequencies are stretched beyond the length a model was first trained on.

    The names are those of Hugging Face configs, the rules are in `qs_jax.models.rope`.

    Attributes:
      factor: Stretch of the context length.
      original_max_positions: Trained length in tokens (`llama3`, `yarn`).
      low_freq_factor: `llama3`: wavelengths above original/low are stretched fully.
      high_freq_factor: `llama3`: wavelengths below original/high are left alone.
      beta_fast: `yarn`: rotations over the trained length above which nothing is stretched.
      beta_slow: `yarn`: rotations below which frequencies are stretched fully.
      attention_factor: `yarn`: multiplies cos and sin; None derives it from `factor`.
      truncate: `yarn`: round the correction range to whole dimensions.
    """

    rope_type: str
    factor: Annotated[Number, Field(ge=1, le=1e6)]
    original_max_positions: Length | None = None
    low_freq_factor: PositiveNumber | None = None
    high_freq_factor: PositiveNumber | None = None
    beta_fast: PositiveNumber = 32.0
    beta_slow: PositiveNumber = 1.0
    attention_factor: PositiveNumber | None = None
    mscale: Weight | None = None
    mscale_all_dim: Weight | None = None
    truncate: Flag = True

    def __post_init__(self) -> None:
        kind = f"RoPE scaling {self.rope_type!r}"
        if self.rope_type not in ROPE_SCALINGS:
            raise ConfigError(f"{kind} is not implemented (known: {', '.join(ROPE_SCALINGS)}).")
        missing = [name for name in ROPE_SCALINGS[self.rope_type] if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"{kind} needs {', '.join(missing)}.")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            need = "low_freq_factor < high_freq_factor"
            raise ConfigError(f"{kind} needs {need}, got {low} and {high}.")


class Sampling(Settings, path="sampling"):
    """How the next token is chosen; by default greedily.

    The filters act in the order of Hugging Face, which is the one below.

    Attributes:
      temperature: Divides the logits; 0 is greedy, whatever the filters are.
      top_k: Sample among the k most likely tokens only; 0 for all.
      top_p: Sample among the smallest set that holds this probability; 1 for all.
      min_p: Sample among tokens whose probability is at least this share of the largest one; 0 for
        all (Nguyen et al. 2024).
      repetition_penalty: Above 1 makes tokens of the prompt and continuation less likely, before
        all others (Keskar et al. 2019, the rule Hugging Face uses); 1 is off.
    """

    temperature: NonNegative = 0.0
    top_k: Count = 0
    top_p: Probability = 1.0
    min_p: Ratio = 0.0
    repetition_penalty: Above0 = 1.0


class ModelConfig(Settings):
    """The architecture of a frozen checkpoint; every size comes from the checkpoint itself.

    Attributes:
      model_type: As in Hugging Face configs: "gpt2", "llama", "mistral", "qwen2" or "qwen3".
      vocab_size: V.
      num_layers: L.
      hidden_size: D, width of the residual stream.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; N is a multiple of K.
      head_dim: H.
      mlp_size: F, inner width of the MLP.
      max_positions: Largest prompt + continuation, in tokens.
      norm_eps: Added to the variance in every norm.
      activation: MLP nonlinearity.
      tie_embeddings: The head reuses the token embedding.
      attention_bias: All four projections of attention have biases.
      mlp_bias: Those of the MLP have.
      qkv_bias: Queries, keys and values have biases, whatever the projection back has.
      qk_norm: Each head's queries and keys are RMS-normalised, before RoPE.
      sliding_window: A query sees itself and the keys of the positions before it, so many in all;
        None for all of them.
      rope_theta: RoPE base; None for learned positions.
      rope_scaling: None for plain RoPE.
      dtype: Of the parameters and of the residual stream. Norms, softmax and logits are float32,
        or float64 where this is.
      bos_token_id: First token of a document, if the model has one.
      eos_token_ids: Any of these ends a row.
      pad_token_id: Fills rows after their end; None means 0.
      weights: Fingerprint of the checkpoint's weights, to which KV maps and presets are bound; None
        fits any. Plays no part in equality.
      generation: How the checkpoint is meant to be sampled, which is what a `Config` does that says
        nothing else. Plays no part in equality.
    """

    model_type: str
    vocab_size: Size
    num_layers: Layers
    hidden_size: Size
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    mlp_size: Size
    max_positions: Length
    norm_eps: Annotated[Number, Field(gt=0, lt=1)]
    activation: str
    tie_embeddings: Flag
    attention_bias: Flag
    mlp_bias: Flag
    qkv_bias: Flag = False
    qk_norm: Flag = False
    sliding_window: Length | None = None
    rope_theta: Annotated[Number, Field(gt=1, le=1e15)] | None = None
    rope_scaling: RopeScaling | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    bos_token_id: Integer | None = None
    eos_token_ids: Integers = ()
    pad_token_id: Integer | None = None
    weights: str | None = dataclasses.field(default=None, compare=False)
    generation: Sampling = dataclasses.field(default=Sampling(), compare=False)

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            raise ConfigError(f"num_heads {heads} must be a multiple of num_kv_heads {kv_heads}.")
        if self.model_type != "gpt2" and self.rope_theta is None:
            raise ConfigError(f"a {self.model_type} model needs rope_theta.")
        if self.rope_theta is not None and self.head_dim % 2:
            raise ConfigError(f"RoPE needs an even head_dim, got {self.head_dim}.")
        self.check_ids("eos_token_ids", self.eos_token_ids)
        for name in ("bos_token_id", "pad_token_id"):
            self.check_ids(name, (getattr(self, name) or 0,))

    def check_ids(self, name: str, ids: Sequence[int]) -> None:
        """Refuse token ids outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                size = self.vocab_size
                raise ConfigError(f"{name} {token} is outside the vocabulary of {size}.")

    def has_weights(self, made_for: str | None) -> bool:
        """Whether these are the weights of that fingerprint; None on either side fits any."""
        return None in (made_for, self.weights) or made_for == self.weights

    def check_weights(self, made_for: str | None, made: str, advice: str) -> None:
        """Refuse what was made ("X was fitted on") for other weights, saying what to do."""
        if not self.has_weights(made_for):
            raise ConfigError(
                f"{made} other weights ({made_for}) than this model's ({self.weights}): {advice}. "
                "Who knows that they fit passes --allow-other-weights, or "
                "model.replace(weights=None)."
            )

    @property
    def q_size(self) -> int:
        """Columns of the query projection, N * H."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key (or the value) projection, K * H."""
        return self.num_kv_heads * self.head_dim
