"""Settings of the four mechanisms. A mechanism is off where its configuration is None.

A layer number counts the layers a token has run, from 1 to L, as in the paper: a token that halts
at layer 15 of 30 runs 15 layers. Per-layer thresholds are tuples of L numbers, entry l - 1 for
layer l. Thresholds are numbers to the program: sweeping them compiles nothing anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field

from qs_jax.config.fields import (
    ONE_OR_MORE,
    Count,
    Flag,
    Integer,
    Integers,
    Number,
    Numbers,
    Positive,
    Probability,
    Settings,
    Threshold,
    name_of,
    named_or_own,
)
from qs_jax.errors import ConfigError

Entropy = Literal["vocab", "shortlist", "latent", "variance", "final_prev"]
Target = Literal["linear", "hidden", "kv"]
_Score: TypeAlias = Literal["attention", "drift", "entropy", "random"]
Score: TypeAlias = Annotated[_Score | Callable[[Any], Any], named_or_own(_Score)]
_Policy: TypeAlias = Literal["skip", "attended", "propagate", "extrapolate"]
Policy: TypeAlias = Annotated[_Policy | Any, named_or_own(_Policy)]


class HaltingConfig(Settings, path="halting"):
    """When a token stops its layers (paper 2.1, B).

    Attributes:
      rule: "dual": a token halts where its drift and its entropy are both below their thresholds.
        "quota": after each of `layers`, the stated share of the prompt has stopped, lowest score
        first. It ranks a whole prompt, so it is for prompts only.
      drift: Distance between a token's states before and after a layer: "raw" L2, "relative" (L2
        over the norm after), or "cosine" (1 - cosine).
      tau_drift: Dual: halt below this. The paper gives several: 0.045, 1e-3, 0.9 to 1.1.
      entropy: Dual: estimator, in nats; None leaves the entropy test out.
      tau_halt: Dual: halt below this, in nats. The paper's 1.15 bits are 0.797 nats.
      window: First and last layer at which a token may halt; None is 1 to L - 1.
      min_layer: No dynamic halting before this layer (the paper's l_min, 5 of 30).
      layers: The only layers at which a token may halt; None is every layer of the window.
      quota: Quota: share of the prompt's eligible tokens that has stopped after each of `layers`.
      score: Quota: "attention" received (maximum over heads and over the prompt's last queries),
        "drift", "entropy", or "random" as a control; or a pure function of
        `qs_jax.mechanisms.custom.Signals` that gives `[B, T]`, lower stops sooner. JSON has its
        "module:name".
      score_queries: Quota: how many of the prompt's last queries count for "attention".
      seed: Quota: of the "random" score.
      light_from: Quota: first layer that tokens run light (`qs_jax.mechanisms.light`), until all of
        them stop at the one layer of `layers`; None runs layers whole. It needs fitted maps.
      light_share: Quota: share of the prompt's eligible tokens that run light. The others, which
        the maps expect to be attended most, run every layer whole.
      forced_ids: Token ids that halt at `forced_layer` at the latest, whatever their signals.
      forced_layer: Layer of the forced halt; it may lie outside the window.
      freeze: False lets halted tokens keep computing: only their keys are skipped, which isolates
        KV skipping.
    """

    rule: Literal["dual", "quota"] = "dual"
    drift: Literal["raw", "relative", "cosine"] = "raw"
    tau_drift: Threshold = 1.0
    entropy: Entropy | None = "vocab"
    tau_halt: Threshold = 0.797
    window: tuple[Integer, Integer] | None = None
    min_layer: Positive = 1
    layers: Annotated[Integers, Field(min_length=1)] | None = None
    quota: Numbers = ()
    score: Score = "attention"
    score_queries: Positive = 32
    seed: Count = 0
    light_from: Integer | None = None
    light_share: Probability = 1.0
    forced_ids: Integers = ()
    forced_layer: Integer | None = None
    freeze: Flag = True

    def __post_init__(self) -> None:
        if self.window is not None and self.window[0] > self.window[1]:
            raise ConfigError(f"halting.window must be (first, last) layer, got {self.window}.")
        if self.layers is not None and list(self.layers) != sorted({*self.layers}):
            raise ConfigError(f"halting.layers must be rising layer numbers, got {self.layers}.")
        if self.rule == "quota":
            if self.layers is None or len(self.quota) != len(self.layers):
                raise ConfigError("rule 'quota' needs halting.layers and a halting.quota for each.")
            if [0, *self.quota, 1] != sorted([0, *self.quota, 1]):
                raise ConfigError(f"halting.quota must be rising shares, 0 to 1, got {self.quota}.")
            if not isinstance(self.score, str) and not callable(self.score):
                raise ConfigError(f"halting.score must be a function, got {self.score!r}.")
            if self.score == "entropy" and self.entropy is None:
                raise ConfigError("halting.score 'entropy' needs halting.entropy.")
        if self.light_from is not None and (self.rule, self.quota) != ("quota", (1.0,)):
            raise ConfigError(
                "halting.light_from needs rule 'quota' with one layer and the quota (1.0,): light "
                "tokens all stop there."
            )
        if self.light_from is None and self.light_share < 1:
            raise ConfigError("halting.light_share is of light layers: give halting.light_from.")
        if self.rule != "quota" and self.quota:
            raise ConfigError("halting.quota is for rule 'quota'; this is 'dual'.")
        if bool(self.forced_ids) != (self.forced_layer is not None):
            raise ConfigError("halting.forced_ids and halting.forced_layer go together.")

    def may_halt(self, num_layers: int) -> np.ndarray:
        """Layers at which a dynamic decision is taken: bool `[L]`, entry l - 1 for layer l."""
        layer = np.arange(1, num_layers + 1)
        first, last = self.window or (1, num_layers - 1)
        allowed = (layer >= max(first, self.min_layer)) & (layer <= last)
        return allowed if self.layers is None else allowed & np.isin(layer, self.layers)

    @property
    def ranks(self) -> bool:
        """Whether decisions compare the tokens of a prompt; light ones all stop together."""
        return self.rule == "quota" and self.light_from is None

    @property
    def leaves_whole(self) -> bool:
        """Whether tokens that are not exempt may run light layers whole."""
        return self.light_share < 1

    @property
    def entropy_used(self) -> Entropy | None:
        """The estimator that decisions read, or that a score of the user's own may read."""
        named = self.score in ("attention", "drift", "random")
        used = self.rule == "dual" or (self.ranks and not named)
        return self.entropy if used else None


class KVSkipConfig(Settings, path="kv_skip"):
    """What becomes of a halted token's keys and values in the layers it does not run (2.2, C).

    Without it, they are computed from the frozen state at every layer, as under "propagate".

    Attributes:
      policy: "skip": left out (the paper). "attended": left out, unless a head of a later query
        gave the key more than `tau_kv` in the last layer where every query could see it (C.4).
        "propagate": from the frozen state. "extrapolate": from the frozen state by linear maps
        (`qs_jax.fit_kv_maps`). Or an object with `keys_values(frozen, layer) -> k, v`, of a
        `qs_jax.mechanisms.custom.Frozen`, which writes every key; JSON has its "module:name".
      tau_kv: "attended": attention weight between 0 and 1.
      delay: "skip" and "attended": layers after halting in which keys are still written.
      retain_ids: "skip" and "attended": token ids whose keys are always written.
    """

    policy: Policy = "skip"
    tau_kv: Annotated[Number, Field(ge=0, lt=1)] | None = None
    delay: Count = 0
    retain_ids: Integers = ()

    def __post_init__(self) -> None:
        if self.policy == "attended" and self.tau_kv is None:
            raise ConfigError("kv_skip.policy 'attended' needs kv_skip.tau_kv.")
        if self.policy != "attended" and self.tau_kv is not None:
            raise ConfigError(f"kv_skip.tau_kv has no effect under {self.policy!r}.")
        if self.policy not in ("skip", "attended") and (self.delay or self.retain_ids):
            raise ConfigError(f"{self.name!r} writes every key: leave out delay and retain_ids.")
        if self.is_custom and not callable(getattr(self.policy, "keys_values", None)):
            raise ConfigError(f"kv_skip.policy {self.name!r} has no method keys_values.")

    @property
    def name(self) -> str:
        """The policy's name, or the "module:name" of the user's own."""
        return name_of(self.policy)

    @property
    def is_custom(self) -> bool:
        """Whether the policy is an object of the user's own."""
        return not isinstance(self.policy, str)

    @property
    def reads_frozen(self) -> bool:
        """Whether keys are read from tokens as they were when they stopped, at a named layer."""
        return self.is_custom or self.policy == "extrapolate"


class FusionConfig(Settings, path="fusion"):
    """When tokens with near-identical states share one path (2.3, D).

    Attributes:
      tau_fuse: Fuse where the distance of two states is below this.
      distance: "raw" L2 (the paper), or "relative" to the mean of the two norms.
      first_layer: No fusion before this layer has run.
      last_layer: No fusion after it; None is L - 1.
      window: How many positions back a partner may lie; 1 is adjacency only.
      tau_attn: Beyond adjacency: running mean over layers of the cosine of query and key (mean over
        heads) must exceed this.
      alpha: Weights of the mean: "uniform", "attention" (what the last member pays to each), or
        "probability" (of the token, by the lens of the state before it at that layer).
      proportional_attention: Add log(size) to a super-token's attention logits.
      tau_ctx: Context-divergence filter (D.8): largest distance of the two tokens' contexts, the
        mean input embedding of their last `context` tokens; None is off.
      context: Tokens in a context.
    """

    tau_fuse: Threshold = 0.15
    distance: Literal["raw", "relative"] = "raw"
    first_layer: Count = 1
    last_layer: Integer | None = None
    window: Positive = 1
    tau_attn: Number | None = None
    alpha: Literal["uniform", "attention", "probability"] = "uniform"
    proportional_attention: Flag = False
    tau_ctx: Number | None = None
    context: Positive = 16

    def __post_init__(self) -> None:
        if (self.window > 1) != (self.tau_attn is not None):
            raise ConfigError("fusion.tau_attn and a fusion.window beyond 1 go together.")
        taus = self.tau_fuse if isinstance(self.tau_fuse, tuple) else ()
        if any(tau > 0 for tau in taus[: max(self.first_layer - 1, 0)]):
            first = self.first_layer
            raise ConfigError(f"fusion.tau_fuse is positive before fusion.first_layer ({first}).")


class AMQConfig(Settings, path="amq"):
    """How many bits a token's activations keep from a middle layer on (2.5, E).

    Attributes:
      layer: Bits are assigned when this layer has run, and hold for all deeper ones.
      entropy: Estimator, in nats; None where the thresholds decide alone (`uniform`).
      normalization: "nats", "log_vocab" (over the largest entropy the estimator can have), or
        "minmax" over the batch (E.1; neither causal nor independent of batch mates).
      tau_low: Below it, 2 bits.
      tau_high: Above it, 8 bits; 4 bits in between.
      targets: What is quantised: "linear" (inputs of the four projections), "hidden" (the residual
        stream), "kv" (keys and values).
      group: Consecutive channels that share a scale. An int8 product has one scale a token; there,
        a group shares the power of two that its codes of 4 or 2 bits are multiples of.
      symmetric: Scale by the largest magnitude instead of minimum and maximum. None is False under
        "fake" and True under "int8", which has no other choice.
      rotate: Hadamard rotation inside each group first; int8 products are rotated in larger blocks.
        None is False under "fake" and True under "int8", which has no other choice.
      execution: "fake": quantise and dequantise; quality only, the saving is simulated. "int8":
        int8 products, and int8 keys and values, in the layers that have bits. There, no token keeps
        more than 8 bits.
      allow_noncausal: Let "minmax" score teacher-forced all the same.
    """

    layer: Count
    entropy: Entropy | None = "vocab"
    normalization: Literal["nats", "log_vocab", "minmax"] = "nats"
    tau_low: Number = 1.0
    tau_high: Number = 2.3
    targets: Annotated[tuple[Target, ...], ONE_OR_MORE] = ("linear",)
    group: Positive = 16
    symmetric: Flag | None = None
    rotate: Flag | None = None
    execution: Literal["fake", "int8"] = "fake"
    allow_noncausal: Flag = False

    @classmethod
    def uniform(cls, bits: Literal[2, 4, 8], layer: int, **fields: Any) -> AMQConfig:
        """The same number of bits for every token that is not protected."""
        taus = {2: (math.inf, math.inf), 4: (-math.inf, math.inf), 8: (-math.inf, -math.inf)}
        if bits not in taus:
            raise ConfigError(f"bits must be 2, 4 or 8, got {bits!r}.")
        low, high = taus[bits]
        return cls(layer=layer, entropy=None, tau_low=low, tau_high=high, **fields)

    def __post_init__(self) -> None:
        fake = self.execution == "fake"
        for name in ("symmetric", "rotate"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, not fake)
        if self.tau_low > self.tau_high:
            raise ConfigError(f"amq.tau_low {self.tau_low} is above tau_high {self.tau_high}.")
        if self.entropy is None and not (math.isinf(self.tau_low) and math.isinf(self.tau_high)):
            raise ConfigError("without amq.entropy, both thresholds must be infinite.")
        if self.entropy == "variance" and self.normalization == "log_vocab":
            raise ConfigError("entropy 'variance' has no largest value: use 'nats' or 'minmax'.")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"amq.targets must be one or more names, got {self.targets}.")
        if not fake and not (self.symmetric and self.rotate):
            got = f"symmetric={self.symmetric}, rotate={self.rotate}"
            raise ConfigError(f"amq.execution 'int8' is symmetric and rotated, got {got}.")
        if not fake and self.targets == ("hidden",):
            raise ConfigError("amq.execution 'int8' is for amq.targets 'linear' and 'kv'.")
        if fake and self.rotate and self.group & (self.group - 1):
            raise ConfigError(f"amq.rotate needs a group that is a power of two, got {self.group}.")
