"""Settings of the four mechanisms. A mechanism is off where its configuration is None.

A layer number counts the layers a token has run, from 1 to L, as in the paper: a token that halts
at layer 15 of 30 runs 15 layers. Per-layer thresholds are tuples of L numbers, entry l - 1 for
layer l. Thresholds are numbers to the program: sweeping them compiles nothing anew.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, no_type_check

import numpy as np

from qs_jax.config.checks import (
    as_bool,
    as_count,
    as_float,
    as_integer,
    as_integers,
    require,
)

INF = float("inf")
ENTROPIES = ("vocab", "shortlist", "latent", "variance", "final_prev")
Threshold = float | tuple[float, ...]


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    told = ", ".join(map(repr, known))
    require(value in known, f"{name} must be one of {told}, got {value!r}.")


def _number(name: str, value: Any) -> float:
    number = as_float(name, value)
    require(number is not None and not math.isnan(number), f"{name} must be a number.")
    assert number is not None
    return number


def _threshold(name: str, value: Any) -> Threshold:
    if np.ndim(value) == 1:
        return tuple(_number(name, entry) for entry in value)
    return _number(name, value)


def _set(config: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(config, name, value)


@no_type_check  # checks and converts what it is given
@dataclasses.dataclass(frozen=True)
class HaltingConfig:
    """When a token stops its layers (paper 2.1, B).

    Attributes:
      rule: "dual": a token halts where its drift and its entropy are both under their thresholds,
        which looks at the token alone. "quota": at each of `layers`, the stated share of the prompt
        with the lowest score has stopped; it ranks a whole prompt, so it is for prompts only.
      drift: Distance between a token's states before and after a layer: "raw" L2, "relative" (L2
        over the norm after), or "cosine" (1 - cosine).
      tau_drift: Dual: halt below this. The paper's own numbers disagree: 0.045, 1e-3, 0.9 to 1.1.
      entropy: Dual: estimator, in nats; None leaves the entropy test out.
      tau_halt: Dual: halt below this, in nats. The paper's 1.15 bits are 0.797 nats.
      window: First and last layer at which a token may halt; None is 1 to L - 1.
      min_layer: No dynamic halting before this layer (the paper's l_min, 5 of 30).
      layers: The only layers at which a token may halt; None is every layer of the window.
      quota: Quota: share of the prompt's eligible tokens that has stopped after each of `layers`.
      score: Quota: "attention" received (maximum over heads and over the prompt's last queries),
        "drift", "entropy", or "random" as a control; the lowest scores stop first.
      score_queries: Quota: how many of the prompt's last queries count for "attention".
      seed: Quota: of the "random" score.
      forced_ids: Token ids that halt at `forced_layer` at the latest, whatever their signals say.
      forced_layer: Layer of the forced halt; it may lie outside the window.
      freeze: False lets flagged tokens keep computing: the decision then only drives KV skipping,
        which isolates that mechanism.
    """

    rule: str = "dual"
    drift: str = "raw"
    tau_drift: Threshold = 1.0
    entropy: str | None = "vocab"
    tau_halt: Threshold = 0.797
    window: tuple[int, int] | None = None
    min_layer: int = 1
    layers: tuple[int, ...] | None = None
    quota: tuple[float, ...] = ()
    score: str = "attention"
    score_queries: int = 32
    seed: int = 0
    forced_ids: tuple[int, ...] = ()
    forced_layer: int | None = None
    freeze: bool = True

    def __post_init__(self) -> None:
        _one_of("halting.rule", self.rule, ("dual", "quota"))
        _one_of("halting.drift", self.drift, ("raw", "relative", "cosine"))
        _one_of("halting.entropy", self.entropy, (*ENTROPIES, None))
        _one_of("halting.score", self.score, ("attention", "drift", "entropy", "random"))
        _set(
            self,
            tau_drift=_threshold("halting.tau_drift", self.tau_drift),
            tau_halt=_threshold("halting.tau_halt", self.tau_halt),
            min_layer=as_count("halting.min_layer", self.min_layer, 1),
            score_queries=as_count("halting.score_queries", self.score_queries, 1),
            seed=as_count("halting.seed", self.seed),
            freeze=as_bool("halting.freeze", self.freeze),
            forced_ids=as_integers("halting.forced_ids", self.forced_ids),
            forced_layer=as_integer("halting.forced_layer", self.forced_layer),
        )
        require(np.ndim(self.quota) == 1, "halting.quota must be a list of shares.")
        _set(self, quota=tuple(_number("halting.quota", share) for share in self.quota))
        if self.window is not None:
            _set(self, window=as_integers("halting.window", self.window))
            require(
                len(self.window) == 2 and self.window[0] <= self.window[1],
                f"halting.window must be (first, last) layer, got {self.window}.",
            )
        if self.layers is not None:
            _set(self, layers=as_integers("halting.layers", self.layers))
            require(
                len(self.layers) > 0 and list(self.layers) == sorted(set(self.layers)),
                f"halting.layers must be rising layer numbers, got {self.layers}.",
            )
        if self.rule == "quota":
            require(
                self.layers is not None and len(self.quota) == len(self.layers),
                "the quota rule needs halting.layers and one share in halting.quota for each.",
            )
            require(
                all(0 <= share <= 1 for share in self.quota)
                and list(self.quota) == sorted(self.quota),
                f"halting.quota must be rising shares between 0 and 1, got {self.quota}.",
            )
            require(
                self.score != "entropy" or self.entropy is not None,
                "score 'entropy' needs halting.entropy.",
            )
        else:
            require(not self.quota, "halting.quota is for rule 'quota'; this is 'dual'.")
        require(
            bool(self.forced_ids) == (self.forced_layer is not None),
            "halting.forced_ids and halting.forced_layer go together.",
        )

    def may_halt(self, num_layers: int) -> np.ndarray:
        """Layers at which a dynamic decision is taken: bool `[L]`, entry l - 1 for layer l."""
        layer = np.arange(1, num_layers + 1)
        first, last = self.window or (1, num_layers - 1)
        allowed = (layer >= max(first, self.min_layer)) & (layer <= last)
        return allowed if self.layers is None else allowed & np.isin(layer, self.layers)

    @property
    def drift_used(self) -> bool:
        """Whether decisions read how far a layer moved a token."""
        return self.rule == "dual" or self.score == "drift"

    @property
    def entropy_used(self) -> str | None:
        """The estimator that decisions read."""
        return self.entropy if self.rule == "dual" or self.score == "entropy" else None


@no_type_check
@dataclasses.dataclass(frozen=True)
class KVSkipConfig:
    """What becomes of a halted token's keys and values in the layers it does not run (2.2, C).

    Without it, they are computed from the frozen state at every layer, as "propagate" does.

    Attributes:
      policy: "skip": none (the paper). "attended": none unless some head of some later query gave
        the key more than `tau_kv` so far, in the last layer where every query could see it (C.4).
        "propagate": from the frozen state. "extrapolate": read from the frozen state by linear maps
        (`qs_jax.fit_kv_maps`).
      tau_kv: "attended": attention weight between 0 and 1.
      delay: "skip" and "attended": layers after halting in which keys are still written.
      retain_ids: "skip" and "attended": token ids whose keys are always written.
    """

    policy: str = "skip"
    tau_kv: float | None = None
    delay: int = 0
    retain_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        known = ("skip", "attended", "propagate", "extrapolate")
        _one_of("kv_skip.policy", self.policy, known)
        _set(
            self,
            delay=as_count("kv_skip.delay", self.delay),
            retain_ids=as_integers("kv_skip.retain_ids", self.retain_ids),
        )
        if self.policy == "attended":
            require(self.tau_kv is not None, "kv_skip.policy 'attended' needs kv_skip.tau_kv.")
            tau_kv = _number("kv_skip.tau_kv", self.tau_kv)
            _set(self, tau_kv=tau_kv)
            require(
                0 <= tau_kv < 1,
                f"kv_skip.tau_kv is an attention weight from 0 to below 1, got {tau_kv}; "
                "policy 'skip' keeps nothing, 'propagate' keeps all.",
            )
        else:
            require(self.tau_kv is None, f"kv_skip.tau_kv has no effect under {self.policy!r}.")
        if self.policy in ("propagate", "extrapolate"):
            require(
                self.delay == 0 and not self.retain_ids,
                f"{self.policy!r} writes every key: kv_skip.delay and kv_skip.retain_ids have "
                "no effect.",
            )


@no_type_check
@dataclasses.dataclass(frozen=True)
class FusionConfig:
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
    distance: str = "raw"
    first_layer: int = 1
    last_layer: int | None = None
    window: int = 1
    tau_attn: float | None = None
    alpha: str = "uniform"
    proportional_attention: bool = False
    tau_ctx: float | None = None
    context: int = 16

    def __post_init__(self) -> None:
        _one_of("fusion.distance", self.distance, ("raw", "relative"))
        _one_of("fusion.alpha", self.alpha, ("uniform", "attention", "probability"))
        _set(
            self,
            tau_fuse=_threshold("fusion.tau_fuse", self.tau_fuse),
            first_layer=as_count("fusion.first_layer", self.first_layer),
            last_layer=as_integer("fusion.last_layer", self.last_layer),
            window=as_count("fusion.window", self.window, 1),
            context=as_count("fusion.context", self.context, 1),
        )
        require(
            (self.window > 1) == (self.tau_attn is not None),
            "fusion.tau_attn and a fusion.window beyond 1 go together: adjacent tokens need no "
            "attention test, others do.",
        )
        for name in ("tau_attn", "tau_ctx"):
            if getattr(self, name) is not None:
                _set(self, **{name: _number(f"fusion.{name}", getattr(self, name))})
        require(
            not isinstance(self.tau_fuse, tuple)
            or all(tau <= 0 for tau in self.tau_fuse[: self.first_layer - 1]),
            f"fusion.tau_fuse is positive before fusion.first_layer ({self.first_layer}).",
        )


@no_type_check
@dataclasses.dataclass(frozen=True)
class AMQConfig:
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
      group: Consecutive channels that share a scale. An int8 product has one scale a token: there,
        a group shares the power of two that its codes of 4 or 2 bits are multiples of.
      symmetric: Scale by the largest magnitude instead of minimum and maximum. None is False under
        "fake", otherwise True, the only choice.
      rotate: Hadamard rotation inside each group first. None is False under "fake", otherwise True,
        the only choice: inputs and weights of an int8 product are rotated in larger blocks.
      execution: "fake": quantise and dequantise; quality only, the saving is simulated. "int8":
        int8 products, and int8 keys and values, in the layers that have bits; no token keeps more
        than 8 there, whether the mechanisms act on it or not. "auto": int8 where an engine finds
        that it is faster on the device, otherwise no AMQ at all; the masked engine simulates it.
      allow_noncausal: Let "minmax" score teacher-forced all the same.
    """

    layer: int
    entropy: str | None = "vocab"
    normalization: str = "nats"
    tau_low: float = 1.0
    tau_high: float = 2.3
    targets: tuple[str, ...] = ("linear",)
    group: int = 16
    symmetric: bool = None  # pyright: ignore[reportAssignmentType]  # __post_init__ chooses
    rotate: bool = None  # pyright: ignore[reportAssignmentType]
    execution: str = "fake"
    allow_noncausal: bool = False

    @classmethod
    def uniform(cls, bits: int, layer: int, **fields: Any) -> AMQConfig:
        """The same number of bits for every token that is not protected."""
        _one_of("bits", bits, (2, 4, 8))
        low, high = {2: (INF, INF), 4: (-INF, INF), 8: (-INF, -INF)}[bits]
        return cls(layer=layer, entropy=None, tau_low=low, tau_high=high, **fields)

    def __post_init__(self) -> None:
        _one_of("amq.entropy", self.entropy, (*ENTROPIES, None))
        _one_of("amq.normalization", self.normalization, ("nats", "log_vocab", "minmax"))
        _one_of("amq.execution", self.execution, ("fake", "int8", "auto"))
        fake = self.execution == "fake"
        if self.symmetric is None:
            _set(self, symmetric=not fake)
        if self.rotate is None:
            _set(self, rotate=not fake)
        _set(
            self,
            layer=as_count("amq.layer", self.layer),
            tau_low=_number("amq.tau_low", self.tau_low),
            tau_high=_number("amq.tau_high", self.tau_high),
            targets=(self.targets,) if isinstance(self.targets, str) else tuple(self.targets),
            group=as_count("amq.group", self.group, 1),
            symmetric=as_bool("amq.symmetric", self.symmetric),
            rotate=as_bool("amq.rotate", self.rotate),
        )
        require(
            self.tau_low <= self.tau_high,
            f"amq.tau_low ({self.tau_low}) is above amq.tau_high ({self.tau_high}).",
        )
        require(
            self.entropy is not None or (math.isinf(self.tau_low) and math.isinf(self.tau_high)),
            "amq.entropy None is for uniform bits: both thresholds must be infinite.",
        )
        require(
            self.entropy != "variance" or self.normalization != "log_vocab",
            "the variance estimator has no largest value to divide by: use nats or minmax.",
        )
        require(len(self.targets) > 0, "amq.targets is empty: nothing would be quantised.")
        require(len(set(self.targets)) == len(self.targets), "amq.targets repeats a name.")
        for target in self.targets:
            _one_of("amq.targets", target, ("linear", "hidden", "kv"))
        require(
            fake or (self.symmetric and self.rotate),
            f"amq.execution {self.execution!r} quantises symmetric and rotated, got "
            f"symmetric={self.symmetric}, rotate={self.rotate}: leave them out, or use execution "
            "'fake'.",
        )
        require(
            fake or self.targets != ("hidden",),
            f"amq.execution {self.execution!r} is for products and the KV cache: add 'linear' or "
            "'kv' to amq.targets, or use execution 'fake'.",
        )
        require(
            not (fake and self.rotate) or (self.group & (self.group - 1)) == 0,
            f"amq.rotate needs a group that is a power of two, got {self.group}.",
        )
