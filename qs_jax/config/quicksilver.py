"""All mechanisms together: what runs, what is exempt, and which combinations make sense."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, no_type_check

import numpy as np

from qs_jax.config.checks import as_count, as_integers, require
from qs_jax.config.mechanisms import AMQConfig, FusionConfig, HaltingConfig, KVSkipConfig
from qs_jax.config.model import ModelConfig
from qs_jax.errors import ConfigError

PROTOCOLS = ("teacher-forced", "continuation")
_PARTS = {"halting": HaltingConfig, "kv_skip": KVSkipConfig, "fusion": FusionConfig}
_PARTS["amq"] = AMQConfig


@no_type_check
@dataclasses.dataclass(frozen=True)
class QuickSilverConfig:
    """Which mechanisms run, and which tokens they leave alone.

    Attributes:
      halting: Stop a token's layers; None is off.
      kv_skip: What becomes of a halted token's keys; None computes them from the frozen state.
      fusion: Merge near-identical tokens; None is off.
      amq: Fewer bits for tokens of low entropy; None is off.
      protect_ids: Token ids that never halt, fuse, lose their keys or go below 8 bits.
      protect_special: The same for the model's BOS, EOS and padding ids.
      sink_tokens: The same for the first positions of a row: attention sinks look converged first.
      recent_tokens: Under "continuation": the last tokens of a prompt are left alone altogether, so
        a prompt no longer than that runs dense. The last one always does, because the first new
        token is read from it.
      shortlist_layer: Layer whose logit lens picks the ids of the "shortlist" entropy.
      shortlist_size: How many ids.
      provenance: Where the numbers come from; plays no part in equality.

    Raises:
      ConfigError: Values out of range, or parts that contradict each other.
    """

    halting: HaltingConfig | None = None
    kv_skip: KVSkipConfig | None = None
    fusion: FusionConfig | None = None
    amq: AMQConfig | None = None
    protect_ids: tuple[int, ...] = ()
    protect_special: bool = True
    sink_tokens: int = 4
    recent_tokens: int = 32
    shortlist_layer: int | None = None
    shortlist_size: int = 32
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "protect_ids", as_integers("protect_ids", self.protect_ids))
        for name, least in (("sink_tokens", 0), ("recent_tokens", 0), ("shortlist_size", 2)):
            object.__setattr__(self, name, as_count(name, getattr(self, name), least))
        for name, part in _PARTS.items():
            value = getattr(self, name)
            require(
                value is None or isinstance(value, part),
                f"{name} must be a {part.__name__} or None, got {value!r}.",
            )
        halting, skip = self.halting, self.kv_skip
        require(
            skip is None or halting is not None,
            "kv_skip acts on the keys of halted tokens: switch halting on (with freeze=False if "
            "tokens should keep computing).",
        )
        if halting is not None and not halting.freeze:
            require(
                skip is not None and skip.policy in ("skip", "attended"),
                "halting with freeze=False does nothing unless kv_skip skips keys.",
            )
        if skip is not None and skip.policy == "extrapolate":
            assert halting is not None  # required above
            require(
                halting.layers is not None,
                "kv_skip.policy 'extrapolate' has one set of maps per halting layer: name the few "
                "halting.layers.",
            )
            assert halting.layers is not None
            require(
                halting.forced_layer is None or halting.forced_layer in halting.layers,
                "kv_skip.policy 'extrapolate' needs forced_layer to be one of halting.layers.",
            )
        require(
            "final_prev" not in self.entropies
            or self.amq is None
            or self.amq.normalization != "minmax",
            "final_prev runs token by token, min-max looks at all tokens at once: not both.",
        )
        require(
            "shortlist" not in self.entropies or self.shortlist_layer is not None,
            "the shortlist entropy needs shortlist_layer, the layer whose lens picks the ids.",
        )

    @property
    def entropies(self) -> tuple[str, ...]:
        """The estimators in use."""
        used = [self.halting.entropy_used if self.halting else None]
        used.append(self.amq.entropy if self.amq else None)
        return tuple(name for name in used if name is not None)

    @property
    def is_off(self) -> bool:
        """No mechanism runs: the dense model."""
        return all(getattr(self, name) is None for name in _PARTS)

    @property
    def prompts_only(self) -> str | None:
        """Why these settings can act on prompts only, or None if they can act anywhere."""
        if self.halting is not None and self.halting.rule == "quota":
            return (
                "the quota rule ranks a whole prompt, so a later token would decide about an "
                "earlier one"
            )
        amq = self.amq
        if amq is not None and amq.normalization == "minmax" and not amq.allow_noncausal:
            return (
                "min-max entropy looks at later tokens and at batch mates (allow_noncausal=True "
                "accepts that)"
            )
        return None

    def check(self, model: ModelConfig, protocol: str) -> None:
        """Refuse what does not fit the model or the protocol.

        Raises:
          ConfigError: With the reason.
        """
        require(protocol in PROTOCOLS, f"protocol must be one of {PROTOCOLS}, got {protocol!r}.")
        reason = self.prompts_only
        require(
            protocol == "continuation" or reason is None,
            f"teacher-forced scoring refuses this configuration: {reason}. Use "
            "protocol='continuation'.",
        )
        require(
            protocol == "teacher-forced" or "final_prev" not in self.entropies,
            "the final_prev entropy is the previous step's output: a prompt, which runs in one "
            "pass, has none. Use protocol='teacher-forced'.",
        )
        deepest = model.num_layers - 1
        if not self.is_off:
            require(deepest >= 1, "a model of one layer has no layers to save.")
        _check_layers(self, deepest)
        _check_lengths(self, model.num_layers)
        if self.amq is not None:
            _check_group(self.amq, model)
        ids = [*self.protect_ids, *(self.halting.forced_ids if self.halting else ())]
        ids += self.kv_skip.retain_ids if self.kv_skip else ()
        for token in ids:
            require(
                0 <= token < model.vocab_size,
                f"token id {token} is outside the vocabulary of {model.vocab_size}.",
            )
        require(
            "shortlist" not in self.entropies or self.shortlist_size <= model.vocab_size,
            f"shortlist_size {self.shortlist_size} exceeds the vocabulary.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, infinite numbers as "inf" and "-inf"; `from_dict` is the inverse."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuickSilverConfig:
        """Inverse of `to_dict`.

        Raises:
          ConfigError: Unknown fields, or values that do not fit.
        """
        try:
            fields = dict(fields)
            for name, part in _PARTS.items():
                if fields.get(name) is not None:
                    fields[name] = part(**{k: _tuples(v) for k, v in fields[name].items()})
            return cls(**{k: _tuples(v) for k, v in fields.items()})
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"not a QuickSilver configuration: {error}") from error


def _within(name: str, layer: int | None, deepest: int) -> None:
    require(
        layer is None or 1 <= layer <= deepest,
        f"{name} is layer {layer}, but only layers 1 to {deepest} leave any to save.",
    )


def _check_layers(qs: QuickSilverConfig, deepest: int) -> None:
    halting, fusion, amq = qs.halting, qs.fusion, qs.amq
    first_uses: list[tuple[str, int, str | None]] = []
    if halting is not None:
        first, last = halting.window or (1, deepest)
        _within("the start of halting.window", first, deepest)
        _within("the end of halting.window", last, deepest)
        _within("halting.forced_layer", halting.forced_layer, deepest)
        first = max(first, halting.min_layer)
        require(
            first <= last,
            f"halting.min_layer {halting.min_layer} leaves no layer of the window up to {last}.",
        )
        for layer in halting.layers or ():
            require(
                first <= layer <= last,
                f"halting.layers holds {layer}, outside the window from {first} to {last}.",
            )
        start = halting.layers[0] if halting.layers else first
        first_uses.append(("halting", start, halting.entropy_used))
    if fusion is not None:
        _within("fusion.first_layer", fusion.first_layer, deepest)
        _within("fusion.last_layer", fusion.last_layer, deepest)
        require(
            fusion.first_layer <= (fusion.last_layer or deepest),
            f"fusion.last_layer {fusion.last_layer} comes before fusion.first_layer "
            f"{fusion.first_layer}.",
        )
    if amq is not None:
        _within("amq.layer", amq.layer, deepest)
        first_uses.append(("amq", amq.layer, amq.entropy))
    if "shortlist" in qs.entropies:
        _within("shortlist_layer", qs.shortlist_layer, deepest)
    for name, start, entropy in first_uses:
        if entropy != "shortlist":
            continue
        assert qs.shortlist_layer is not None  # required by __post_init__
        require(
            qs.shortlist_layer <= start,
            f"{name} reads the shortlist at layer {start}, before shortlist_layer "
            f"{qs.shortlist_layer} has picked it.",
        )


def _check_lengths(qs: QuickSilverConfig, layers: int) -> None:
    named = {}
    if qs.halting is not None:
        named |= {"halting.tau_drift": qs.halting.tau_drift}
        named |= {"halting.tau_halt": qs.halting.tau_halt}
    if qs.fusion is not None:
        named["fusion.tau_fuse"] = qs.fusion.tau_fuse
    for name, value in named.items():
        require(
            not isinstance(value, tuple) or len(value) == layers,
            f"{name} has {len(value) if isinstance(value, tuple) else 1} entries for {layers} "
            "layers.",
        )


def _check_group(amq: AMQConfig, model: ModelConfig) -> None:
    widths = {}
    if "linear" in amq.targets:
        widths |= {"hidden_size": model.hidden_size, "q_size": model.q_size}
        widths["mlp_size"] = model.mlp_size
    if "hidden" in amq.targets:
        widths["hidden_size"] = model.hidden_size
    if "kv" in amq.targets:
        widths["head_dim"] = model.head_dim
    for name, width in widths.items():
        require(
            width % amq.group == 0,
            f"amq.group {amq.group} does not divide this model's {name} of {width}.",
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value.item() if isinstance(value, np.generic) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(entry) for entry in value)
    return float(value) if value in ("inf", "-inf") else value
