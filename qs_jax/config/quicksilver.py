"""All mechanisms together, and one call under them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from qs_jax.config.fields import (
    ONE_OR_MORE,
    Above0,
    Count,
    Flag,
    Function,
    Integer,
    Integers,
    NonNegative,
    Positive,
    Probability,
    Ratio,
    Seed,
    Settings,
)
from qs_jax.config.mechanisms import AMQConfig, Entropy, FusionConfig, HaltingConfig, KVSkipConfig
from qs_jax.config.model import ModelConfig, Sampling
from qs_jax.errors import ConfigError

Protocol = Literal["teacher-forced", "continuation"]
PROTOCOLS: tuple[Protocol, Protocol] = ("teacher-forced", "continuation")
# The settings of a greedy call, whatever the defaults of the checkpoint are.
GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}


class QuickSilverConfig(Settings):
    """Which mechanisms run, and which tokens they leave alone.

    Attributes:
      halting: Stop a token's layers; None is off.
      kv_skip: What becomes of a halted token's keys; None computes them from the frozen state.
      fusion: Merge near-identical tokens; None is off.
      amq: Fewer bits for tokens of low entropy; None is off.
      protect_ids: Token ids that never halt, fuse, lose their keys or go below 8 bits.
      protect_special: The same for the model's BOS, EOS and padding ids.
      sink_tokens: The same for the first positions of a row, which are attention sinks.
      recent_tokens: Under "continuation": the same for the last tokens of a prompt, so a prompt no
        longer than that runs dense. The last one is always exempt: the first new token is read
        from it.
      recent_tokens_over: Pairs (n, r), n rising: of a prompt longer than n tokens, the last r are
        exempt instead. A preset's own, for each length at which it was verified.
      shortlist_layer: Layer whose logit lens picks the ids of the "shortlist" entropy.
      shortlist_size: How many ids.
      provenance: Where the numbers come from; plays no part in equality.
    """

    halting: HaltingConfig | None = None
    kv_skip: KVSkipConfig | None = None
    fusion: FusionConfig | None = None
    amq: AMQConfig | None = None
    protect_ids: Integers = ()
    protect_special: Flag = True
    sink_tokens: Count = 4
    recent_tokens: Count = 32
    recent_tokens_over: tuple[tuple[Positive, Count], ...] = ()
    shortlist_layer: Integer | None = None
    shortlist_size: Annotated[Integer, Field(ge=2)] = 32
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        halting, skip, amq = self.halting, self.kv_skip, self.amq
        if skip is not None and halting is None:
            raise ConfigError("kv_skip acts on the keys of halted tokens: switch halting on.")
        skips = skip is not None and skip.policy in ("skip", "attended")
        if halting is not None and not halting.freeze and not skips:
            raise ConfigError("halting.freeze=False does nothing unless kv_skip skips keys.")
        if halting is not None and skip is not None and skip.reads_frozen:
            if halting.layers is None:
                raise ConfigError(
                    f"policy {skip.name!r} works by layer: name the few halting.layers."
                )
            if halting.forced_layer not in (None, *halting.layers):
                raise ConfigError(f"policy {skip.name!r} needs forced_layer among halting.layers.")
        lengths = [n for n, _ in self.recent_tokens_over]
        if lengths != sorted(set(lengths)):
            raise ConfigError(f"recent_tokens_over needs rising lengths, got {lengths}.")
        light = halting is not None and halting.light_from is not None
        reads_maps = skip is not None and skip.policy == "extrapolate"
        if light and not (reads_maps and self.fusion is None and amq is None):
            raise ConfigError(
                "halting.light_from goes with kv_skip.policy 'extrapolate', whose maps hold the "
                "light layers, and without fusion and amq."
            )
        if "final_prev" in self.entropies and amq is not None and amq.normalization == "minmax":
            raise ConfigError("final_prev runs token by token, minmax on all tokens: not both.")
        if "shortlist" in self.entropies and self.shortlist_layer is None:
            raise ConfigError("entropy 'shortlist' needs shortlist_layer: its lens picks the ids.")

    def recent_of(self, lengths_B: np.ndarray) -> np.ndarray:
        """Last tokens that are exempt, of prompts of these lengths; 1 at least."""
        recent_B = np.full(np.shape(lengths_B), max(self.recent_tokens, 1))
        for length, recent in self.recent_tokens_over:
            recent_B = np.where(np.asarray(lengths_B) > length, max(recent, 1), recent_B)
        return recent_B

    def leaves_alone(self, prompt_length: int) -> bool:
        """Whether a prompt so short runs dense under "continuation": all its tokens are exempt.

        Bits reach exempt tokens, too: the first ones have 8, and int8 is for whole layers.
        """
        exempt = self.sink_tokens + int(self.recent_of(np.array(prompt_length)))
        return prompt_length <= exempt and self.amq is None

    def explain_idle(self, prompt_lengths: Sequence[int] | np.ndarray) -> str:
        """Say in a sentence or two why nothing halted, fused or lost bits in a call.

        Args:
          prompt_lengths: Tokens of each prompt; empty, or zeros, where every token counts as new.
        """
        longest = int(np.max(prompt_lengths, initial=0))
        recent, sinks = int(self.recent_of(np.array(longest))), self.sink_tokens
        if self.is_off:
            why = "no mechanism is on"
        elif not longest:
            only = self.prompts_only and "the preset acts on prompts only, and there is none"
            why = only or "no token met the preset's thresholds"
        elif not self.leaves_alone(longest):
            why = "no token of the prompt met the preset's thresholds"
        elif recent >= longest and any(longest > n for n, _ in self.recent_tokens_over):
            why = f"the preset runs prompts of {longest:,} tokens dense"
        else:
            why = (
                f"the preset leaves the first {sinks} and the last {recent} tokens of a prompt "
                f"alone, and here it has {longest}. It acts on prompts of {sinks + recent + 1} "
                "tokens or more"
            )
        return f"Nothing was left out: {why}."

    @property
    def entropies(self) -> tuple[Entropy, ...]:
        """The estimators in use."""
        used = (self.halting and self.halting.entropy_used, self.amq and self.amq.entropy)
        return tuple(name for name in used if name is not None)

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """Names of the mechanisms that run."""
        names = ("halting", "kv_skip", "fusion", "amq")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def is_off(self) -> bool:
        """No mechanism runs: the dense model."""
        return not self.mechanisms

    @property
    def prompts_only(self) -> str | None:
        """Why these settings can act on prompts only, or None if they can act anywhere."""
        if self.halting is not None and self.halting.rule == "quota":
            return "the quota rule ranks a whole prompt, so later tokens decide about earlier ones"
        amq = self.amq
        if amq is not None and amq.normalization == "minmax" and not amq.allow_noncausal:
            return "min-max entropy looks at later tokens and at batch mates (allow_noncausal=True)"
        return None

    def check(self, model: ModelConfig, protocol: str) -> None:
        """Refuse what does not fit the model or the protocol, by a ConfigError with the reason."""
        if protocol not in PROTOCOLS:
            raise ConfigError(f"protocol must be one of {PROTOCOLS}, got {protocol!r}.")
        if protocol == "teacher-forced" and self.prompts_only is not None:
            raise ConfigError(f"{self.prompts_only}: use protocol='continuation'.")
        if protocol == "continuation" and "final_prev" in self.entropies:
            raise ConfigError(
                "final_prev is the entropy of the previous step's output, and a prompt, which runs "
                "in one pass, has none. Use protocol='teacher-forced'."
            )
        if model.num_layers == 1 and not self.is_off:
            raise ConfigError("a model of one layer has no layers to save.")
        _check_layers(self, model.num_layers)
        _check_thresholds(self, model.num_layers)
        if self.amq is not None:
            _check_group(self.amq, model)
        ids = [*self.protect_ids, *(self.halting.forced_ids if self.halting else ())]
        model.check_ids("token id", [*ids, *(self.kv_skip.retain_ids if self.kv_skip else ())])
        if "shortlist" in self.entropies and self.shortlist_size > model.vocab_size:
            raise ConfigError(f"shortlist_size {self.shortlist_size} exceeds the vocabulary.")


def _check_layers(qs: QuickSilverConfig, depth: int) -> None:
    """Layers must be those of the model, and in order."""
    halting, fusion, amq, deepest = qs.halting, qs.fusion, qs.amq, depth - 1
    layers: dict[str, int | None] = {}
    readers: dict[str, int] = {}  # first layers that read the shortlist
    if halting is not None:
        first, last = halting.window or (1, deepest)
        layers |= {"the start of halting.window": first, "the end of halting.window": last}
        layers |= {"halting.forced_layer": halting.forced_layer}
        if halting.light_from is not None:
            stop = (halting.layers or (deepest,))[0]
            if not 2 <= halting.light_from <= stop:
                got = halting.light_from
                raise ConfigError(f"halting.light_from must be 2 to {stop}, got {got}.")
        first = max(first, halting.min_layer)
        if first > last:
            raise ConfigError(f"halting.min_layer {first} leaves no layer up to {last}.")
        for layer in halting.layers or ():
            if not first <= layer <= last:
                raise ConfigError(f"halting.layers: {layer} is outside the window {first}-{last}.")
        if halting.entropy_used == "shortlist":
            readers["halting"] = halting.layers[0] if halting.layers else first
    if fusion is not None:
        start, end = fusion.first_layer, fusion.last_layer
        layers |= {"fusion.first_layer": start, "fusion.last_layer": end}
        if start > (end or deepest):
            raise ConfigError(f"fusion.last_layer {end} comes before fusion.first_layer {start}.")
    if amq is not None:
        layers["amq.layer"] = amq.layer
        if amq.entropy == "shortlist":
            readers["amq"] = amq.layer
    if readers:
        layers["shortlist_layer"] = qs.shortlist_layer
    for name, layer in layers.items():
        if layer is not None and not 1 <= layer <= deepest:
            raise ConfigError(f"{name} is layer {layer}; only 1 to {deepest} leave any to save.")
    for name, start in readers.items():
        if start < (qs.shortlist_layer or 0):
            picked = f"before shortlist_layer {qs.shortlist_layer}"
            raise ConfigError(f"{name} reads the shortlist at layer {start}, {picked}.")


def _check_thresholds(qs: QuickSilverConfig, depth: int) -> None:
    for part, name in (("halting", "tau_drift"), ("halting", "tau_halt"), ("fusion", "tau_fuse")):
        taus = getattr(getattr(qs, part), name, None)
        if isinstance(taus, tuple) and len(taus) != depth:
            raise ConfigError(f"{part}.{name} has {len(taus)} entries for {depth} layers.")


def _check_group(amq: AMQConfig, model: ModelConfig) -> None:
    widths = {}
    if "linear" in amq.targets:
        widths |= {"q_size": model.q_size, "mlp_size": model.mlp_size}
    if "linear" in amq.targets or "hidden" in amq.targets:
        widths["hidden_size"] = model.hidden_size
    if "kv" in amq.targets:
        widths["head_dim"] = model.head_dim
    for name, width in widths.items():
        if width % amq.group:
            raise ConfigError(f"amq.group {amq.group} does not divide the model's {name}, {width}.")


class Speculation(Settings):
    """Draft several tokens and verify them in one step, which changes no token.

    A draft is what followed the latest earlier occurrence of the last tokens, in the prompt or in
    the continuation ("prompt lookup", Saxena 2023). A drafted token is kept where the model, run
    on all of them at once, chooses the same one: greedy, or with the noise of its position.

    Attributes:
      draft: Where drafts come from.
      length: K, drafted tokens a step; the step runs 1 + K.
      ngram: Lengths of the last tokens that are looked up, in the order they are tried.
      gate: Drafted tokens a row that must be expected to be kept, by what was kept lately; a step
        that expects fewer runs one token a row. In a batch the rows that are behind decide. 0
        verifies every draft. None: what pays on this device.
      exact: Run every step on 1 + K tokens, attended to in the same order: what was drafted then
        cannot change how a number is rounded. Without it, bfloat16 texts may differ at near-ties.
    """

    draft: Literal["lookup"] = "lookup"
    length: Annotated[Positive, Field(le=7)] = 7
    ngram: Annotated[tuple[Positive, ...], ONE_OR_MORE, Field(min_length=1)] = (3, 2)
    gate: NonNegative | None = None
    exact: Flag = False


class Config(Settings):
    """What one call of `generate`, `stream` or `score` does.

    Attributes:
      model: Architecture, from `qs_jax.load`.
      quicksilver: Mechanisms, from `qs_jax.presets`; None is the dense model.
      protocol: What the mechanisms act on. "teacher-forced": every token, prompt or new, as if it
        had just been generated. "continuation": the prompt only; the tokens after it run dense.
        None: see `effective_protocol`.
      continuation_tokens: `score` under "continuation" takes the last tokens of each row as the
        continuation, unless it is given prompt lengths.
      max_new_tokens: Longest continuation of a row, in tokens.
      temperature: As in `Sampling`, and so are the next four; None takes the model's, which are the
        checkpoint's defaults.
      top_k: 0 for all tokens.
      top_p: 1 for all tokens.
      min_p: 0 for all tokens.
      repetition_penalty: 1 is off.
      seed: Row b of a batch draws from `fold_in(key(seed), b)`.
      eos_token_ids: Tokens that end a row; None takes the model's, () never stops.
      stop: Strings that end a row where its new text comes to hold one, however tokens cut it. The
        tokens that complete it are among the row's; the call needs the tokenizer.
      num_return_sequences: Continuations of each prompt, in consecutive rows, which need sampling.
      logits_processors: Pure JAX functions of the logits `[B, V]` and the `sampling.SoFar` of each
        row, that return logits. They run after the repetition penalty.
      engine: "masked": the definition, which computes every token and selects by masks; savings
        are simulated. "compact": the fast engines, prompt and decode, which make the same decisions
        on active tokens only; what they cannot run is refused. "auto": the fast engines wherever
        they can run, else the masked one.
      speculate: Draft and verify new tokens, on the fast engines; None runs them one by one. The
        mechanisms can then act on prompts only.
    """

    model: ModelConfig
    quicksilver: QuickSilverConfig | None = None
    protocol: Protocol | None = None
    continuation_tokens: Positive = 128
    max_new_tokens: Positive = 64
    temperature: NonNegative | None = None
    top_k: Count | None = None
    top_p: Probability | None = None
    min_p: Ratio | None = None
    repetition_penalty: Above0 | None = None
    seed: Seed = 0
    eos_token_ids: Annotated[Integers, ONE_OR_MORE] | None = None
    stop: Annotated[tuple[str, ...], ONE_OR_MORE] = ()
    num_return_sequences: Positive = 1
    logits_processors: tuple[Function, ...] = ()
    engine: Literal["auto", "masked", "compact"] = "auto"
    speculate: Speculation | None = None

    def __post_init__(self) -> None:
        if self.quicksilver is not None:
            self.quicksilver.check(self.model, self.effective_protocol)
            acting = ", ".join(self.quicksilver.mechanisms)
            if self.speculate is not None and acting and self.effective_protocol != "continuation":
                raise ConfigError(
                    f"speculate verifies new tokens at full depth, but {acting} would act on "
                    "them: use protocol='continuation', or no mechanisms."
                )
        self.model.check_ids("eos_token_ids: id", self.eos_token_ids or ())
        if "" in self.stop:
            raise ConfigError("stop holds an empty string, which every text does.")
        if self.num_return_sequences > 1 and self.sampling.temperature == 0:
            raise ConfigError(
                "num_return_sequences above 1 would repeat one greedy text: give a temperature."
            )

    @property
    def effective_protocol(self) -> Protocol:
        """`protocol`; if None, "teacher-forced", unless the mechanisms can act on prompts only."""
        if self.protocol is not None:
            return self.protocol
        return PROTOCOLS[self.quicksilver is not None and bool(self.quicksilver.prompts_only)]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token ids that end a row of this call."""
        return self.model.eos_token_ids if self.eos_token_ids is None else self.eos_token_ids

    @property
    def sampling(self) -> Sampling:
        """How this call chooses tokens: its own settings, and the model's where it has none."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)}
        return self.model.generation.replace(**{k: v for k, v in own.items() if v is not None})
