"""What one call of `generate`, `stream` or `score` should do."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, no_type_check

from qs_jax.config.checks import as_count, as_float, as_integer, as_integers, require
from qs_jax.config.model import ModelConfig
from qs_jax.config.quicksilver import PROTOCOLS, QuickSilverConfig

_CHOICES = {
    "engine": ("auto", "masked", "compact"),
    "capacity": ("dynamic", "planned"),
    "decode_weights": ("auto", "stacked", "separate"),
}


@no_type_check  # it checks and converts what users give it itself
@dataclasses.dataclass(frozen=True)
class Config:
    """What one call of `generate`, `stream` or `score` should do.

    Attributes:
      model: Architecture, from `qs_jax.load`.
      quicksilver: Mechanisms, from `qs_jax.presets`; None is the dense model.
      protocol: What the mechanisms act on. "teacher-forced": every token, prompt or new, as if it
        had just been generated. "continuation": the prompt only, whose readouts nobody needs; the
        tokens after it run dense. None takes what the mechanisms can do: see `effective_protocol`.
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
        masks; savings are simulated. "compact": the same decisions, work on active tokens only,
        and KV caches that hold what is needed only. "auto" is "compact" wherever it can run.
      capacity: Compact engine: how many token slots a segment of layers gets. "dynamic": the
        smallest of a few static capacities that holds the active tokens, exactly the masked
        engine's decisions. "planned": fixed before the call from `retention`, or from the quota
        rule's shares; where more tokens stay active than fit, those with the lowest halting score
        halt too. Planned capacities rank a whole prompt, so they are for prompts only.
      retention: "planned": pairs (layer, share): after this layer, at most this share of each
        prompt stays active. Layers and shares rise and fall respectively.
      unroll: Layers per iteration of the dense model's scan over the layers of a prompt or a scored
        row (`jax.lax.scan`): fewer iterations, more to compile.
      decode_weights: "stacked": decoding scans over the stacked layers. "separate": it runs layer
        after layer on arrays of their own, copied once and kept as long as the parameters; XLA's
        CPU backend would otherwise copy every layer's weights at every token of several rows.
        "auto" is "separate" for several rows on CPU.

    Raises:
      ConfigError: A value is outside its range.
    """

    model: ModelConfig
    quicksilver: QuickSilverConfig | None = None
    protocol: str | None = None
    continuation_tokens: int = 128
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] | None = None
    engine: str = "auto"
    capacity: str = "dynamic"
    retention: tuple[tuple[int, float], ...] = ()
    unroll: int = 1
    decode_weights: str = "auto"

    def __post_init__(self) -> None:
        require(
            isinstance(self.model, ModelConfig),
            f"model must be the ModelConfig that qs_jax.load returns, got {self.model!r}.",
        )
        require(
            self.quicksilver is None or isinstance(self.quicksilver, QuickSilverConfig),
            f"quicksilver must come from qs_jax.presets, got {self.quicksilver!r}.",
        )
        require(
            self.protocol is None or self.protocol in PROTOCOLS,
            f"protocol must be one of {PROTOCOLS}, got {self.protocol!r}.",
        )
        if self.quicksilver is not None:
            self.quicksilver.check(self.model, self.effective_protocol)
        for name in ("max_new_tokens", "top_k", "seed", "continuation_tokens"):
            object.__setattr__(self, name, as_integer(name, getattr(self, name)))
        for name in ("temperature", "top_p", "repetition_penalty"):
            object.__setattr__(self, name, as_float(name, getattr(self, name)))
        self._check_engine()
        if self.eos_token_ids is not None:
            given = self.eos_token_ids
            listed = given if isinstance(given, tuple | list) else [given]
            ids = tuple(as_integer("eos_token_ids", token) for token in listed)
            object.__setattr__(self, "eos_token_ids", ids)
        require(
            self.max_new_tokens >= 1,
            f"max_new_tokens must be at least 1, got {self.max_new_tokens}.",
        )
        require(
            self.continuation_tokens >= 1,
            f"continuation_tokens must be at least 1, got {self.continuation_tokens}.",
        )
        require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature must be 0 (greedy) or positive, got {self.temperature}.",
        )
        require(
            self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, got {self.top_k}."
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"top_p must be above 0 and at most 1, got {self.top_p}.",
        )
        require(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            f"repetition_penalty must be positive, got {self.repetition_penalty}.",
        )
        require(0 <= self.seed < 2**32, f"seed must be in [0, 2**32), got {self.seed}.")
        for token in self.eos_token_ids or ():
            require(
                0 <= token < self.model.vocab_size,
                f"eos_token_ids holds {token}, outside the vocabulary of {self.model.vocab_size}.",
            )

    def _check_engine(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            require(value in known, f"{name} must be one of {known}, got {value!r}.")
        object.__setattr__(self, "unroll", as_count("unroll", self.unroll, 1))
        layers = list(as_integers("retention", [layer for layer, _ in self.retention]))
        shares = [float(share) for _, share in self.retention]
        retention = tuple(zip(layers, shares, strict=True))
        object.__setattr__(self, "retention", retention)
        require(
            layers == sorted(set(layers)) and all(1 <= n < self.model.num_layers for n in layers),
            f"retention needs rising layers from 1 to {self.model.num_layers - 1}, got {layers}.",
        )
        require(
            shares == sorted(shares, reverse=True) and all(0 < share <= 1 for share in shares),
            f"retention needs falling shares above 0 and at most 1, got {shares}.",
        )
        planned = self.capacity == "planned"
        require(planned or not retention, "retention is for capacity 'planned'.")
        halting = self.quicksilver.halting if self.quicksilver is not None else None
        require(
            not planned or (halting is not None and halting.freeze),
            "capacity 'planned' halts tokens: it needs halting in quicksilver, with freeze=True.",
        )
        require(
            not planned or self.effective_protocol == "continuation",
            "capacity 'planned' ranks a whole prompt, so a later token would decide about an "
            "earlier one: it is for protocol 'continuation'.",
        )
        require(
            not planned or bool(retention) or (halting is not None and halting.rule == "quota"),
            "capacity 'planned' needs retention, or the quota rule to plan from.",
        )

    def replace(self, **changes: Any) -> Config:
        """A copy with `changes` applied and checked again."""
        return dataclasses.replace(self, **changes)

    @property
    def effective_protocol(self) -> str:
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
