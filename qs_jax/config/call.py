"""What one call of `generate`, `stream` or `score` does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from qs_jax.config.fields import Integer, Integers, Number, Positive, Settings, require
from qs_jax.config.model import ModelConfig
from qs_jax.config.quicksilver import PROTOCOLS, Protocol, QuickSilverConfig


def _is_model(value: Any) -> ModelConfig:
    require(
        isinstance(value, ModelConfig),
        f"model must be the ModelConfig that qs_jax.load returns, got {value!r}.",
    )
    return value


def _is_quicksilver(value: Any) -> QuickSilverConfig | None:
    require(
        value is None or isinstance(value, QuickSilverConfig),
        f"quicksilver must come from qs_jax.presets, got {value!r}.",
    )
    return value


class Config(Settings):
    """What one call of `generate`, `stream` or `score` does.

    Attributes:
      model: Architecture, from `qs_jax.load`.
      quicksilver: Mechanisms, from `qs_jax.presets`; None is the dense model.
      protocol: What the mechanisms act on. "teacher-forced": every token, prompt or new, as if it
        had just been generated. "continuation": the prompt only; the tokens after it run dense.
        None takes what the mechanisms can do: see `effective_protocol`.
      continuation_tokens: `score` under "continuation" takes the last tokens of each row as the
        continuation, unless it is given prompt lengths.
      max_new_tokens: Longest continuation of a row, in tokens.
      temperature: Divides the logits; 0 is greedy.
      top_k: Sample among the k most likely tokens only; None for all.
      top_p: Sample among the smallest set that holds this probability; None for all.
      repetition_penalty: Above 1 makes tokens of the prompt and continuation less likely
        (Keskar et al. 2019, the rule Hugging Face uses); 1 is off.
      seed: Row b of a batch draws from `fold_in(key(seed), b)`.
      eos_token_ids: Tokens that end a row; None takes the model's, () never stops.
      engine: What runs the mechanisms. "masked": the definition, dense work with decisions as
        masks; savings are simulated. "compact": the fast engines for prompts and new tokens, which
        take the same decisions, compute active tokens only and cache only what later queries see.
        "auto" is "compact" wherever it can run.
      decode_weights: "stacked": decoding scans over the stacked layers. "separate": it runs layer
        after layer on arrays of their own, copied once and kept as long as the parameters; XLA's
        CPU backend would otherwise copy every layer's weights at every token of several rows.
        "auto" is "separate" for several rows on CPU.

    Raises:
      ConfigError: A value is outside its range.
    """

    model: Annotated[ModelConfig, BeforeValidator(_is_model)]
    quicksilver: Annotated[QuickSilverConfig | None, BeforeValidator(_is_quicksilver)] = None
    protocol: Protocol | None = None
    continuation_tokens: Positive = 128
    max_new_tokens: Positive = 64
    temperature: Annotated[Number, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_k: Positive | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, allow_inf_nan=False)] = 1.0
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    eos_token_ids: (
        Annotated[Integers, BeforeValidator(lambda x: (x,) if isinstance(x, int) else x)] | None
    ) = None
    engine: Literal["auto", "masked", "compact"] = "auto"
    decode_weights: Literal["auto", "stacked", "separate"] = "auto"

    def __post_init__(self) -> None:
        if self.quicksilver is not None:
            self.quicksilver.check(self.model, self.effective_protocol)
        for token in self.eos_token_ids or ():
            require(
                0 <= token < self.model.vocab_size,
                f"eos_token_ids holds {token}, outside the vocabulary of {self.model.vocab_size}.",
            )

    @property
    def effective_protocol(self) -> Protocol:
        """The protocol of this call.

        As given; else "teacher-forced", unless the mechanisms can act on prompts only
        (`QuickSilverConfig.prompts_only`).
        """
        if self.protocol is not None:
            return self.protocol
        return PROTOCOLS[self.quicksilver is not None and bool(self.quicksilver.prompts_only)]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token ids that end a row of this call."""
        return self.model.eos_token_ids if self.eos_token_ids is None else self.eos_token_ids
