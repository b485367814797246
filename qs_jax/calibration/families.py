"""Search spaces: knobs that go up in steps, and the preset at each combination of levels.

A candidate is a tuple of levels. Level 0 of every knob is "nothing"; each step up saves more and
costs more. All candidates of a KV policy that use the same mechanisms share one compiled program:
they differ in quotas and thresholds, which are numbers to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from qs_jax import presets
from qs_jax.calibration.observe import Observed
from qs_jax.config import (
    AMQConfig,
    FusionConfig,
    HaltingConfig,
    KVSkipConfig,
    ModelConfig,
    QuickSilverConfig,
)
from qs_jax.errors import ConfigError
from qs_jax.mechanisms.kv_maps import KVMaps, select
from qs_jax.models import Params

Levels = tuple[int, ...]
# Default places of halting, as shares of the depth.
DEPTHS = (0.4, 0.5, 0.6, 0.67, 0.73, 0.8, 0.87, 0.93)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_HALT_PERCENTS = (25, 50, 75, 90)
_FUSE_PERCENTS = (5, 15, 25)


class Space(NamedTuple):
    """Knobs of a KV policy: one for each halting layer, fusion, and `bits` where there are any."""

    skip: KVSkipConfig
    rule: str  # "quota" (prompts only) or "dual"
    layers: tuple[int, ...]
    observed: Observed
    model: ModelConfig
    fuses: bool = True
    bits: AMQConfig | None = None
    score: Any = "attention"

    @property
    def policy(self) -> str:
        """Name of the family."""
        return self.skip.name

    @property
    def start(self) -> Levels:
        """Every knob at 0: the dense model."""
        return (0,) * (len(self.layers) + 2)

    def steps(self, levels: Levels) -> Iterator[tuple[int, Levels]]:
        """(knob, levels after it goes one step up); deeper layers keep up with a quota."""
        halting = len(self.layers)
        steepest = len(SHARES) - 1 if self.rule == "quota" else len(_HALT_PERCENTS)
        top = (*[steepest] * halting, len(_FUSE_PERCENTS) * self.fuses, int(self.bits is not None))
        for knob, level in enumerate(levels):
            if level == top[knob]:
                continue
            after = list(levels)
            after[knob] = level + 1
            if self.rule == "quota" and knob < halting:
                after[knob:halting] = [max(at, level + 1) for at in after[knob:halting]]
            yield knob, tuple(after)

    def preset(self, levels: Levels, *, lean: bool = False) -> QuickSilverConfig:
        """The mechanisms at these levels; a `lean` preset, to keep, has only what acts.

        Without, all candidates halt at the same layers and share a program.
        """
        *halting, fusion, bits = levels
        halts, middle = any(halting) or not lean, max(self.model.num_layers // 2, 1)
        return QuickSilverConfig(
            halting=self._halting(halting, lean) if halts else None,
            kv_skip=self.skip if halts else None,
            fusion=self._fusion(fusion, middle) if fusion else None,
            amq=self.bits if bits else None,
        )

    def params(self, params: Params, levels: Levels, qs: QuickSilverConfig) -> Params:
        """The parameters with the maps these mechanisms read, and no others."""
        del levels
        kept = {name: value for name, value in params.items() if name != "kv_maps"}
        if qs.kv_skip is not None and self.policy == "extrapolate":
            assert qs.halting is not None
            kept["kv_maps"] = select(params["kv_maps"], qs.halting.layers or ())
        return kept

    def _halting(self, levels: list[int], lean: bool) -> HaltingConfig:
        pairs = list(zip(self.layers, levels, strict=True))
        if self.rule == "quota":
            before = (0, *levels)
            steps = [pair for i, pair in enumerate(pairs) if not lean or levels[i] > before[i]]
            named = self.score in ("attention", "drift", "random")
            return HaltingConfig(
                rule="quota",
                layers=tuple(layer for layer, _ in steps),
                quota=tuple(SHARES[level] for _, level in steps),
                score=self.score,
                entropy=None if named else "vocab",
            )
        tau_drift = [float("-inf")] * self.model.num_layers
        tau_halt = list(tau_drift)
        for layer, level in pairs:
            if level:
                percent = _HALT_PERCENTS[level - 1]
                tau_drift[layer - 1] = self.observed.at("drift", percent)[layer - 1]
                tau_halt[layer - 1] = self.observed.at("entropy", percent)[layer - 1]
        layers = tuple(layer for layer, level in pairs if level or not lean)
        return HaltingConfig(tau_drift=tuple(tau_drift), tau_halt=tuple(tau_halt), layers=layers)

    def _fusion(self, level: int, first: int) -> FusionConfig:
        near = self.observed.at("relative_distance", _FUSE_PERCENTS[level - 1])
        tau_fuse = tuple(tau if at >= first else 0.0 for at, tau in enumerate(near, start=1))
        return FusionConfig(tau_fuse=tau_fuse, distance="relative", first_layer=first)


def bits_for(objective: str, model: ModelConfig) -> AMQConfig | None:
    """The quantization that serves an objective; None where none does."""
    if objective == "paper_flops":
        return AMQConfig.uniform(8, layer=max(model.num_layers // 2, 1), execution="int8")
    return presets.int8_cache(model) if objective == "kv_bytes" else None


class LightSpace(NamedTuple):
    """Fitted streams of light layers.

    Levels are the first light layer, the stop, the number of the price and that of the share.

    Attributes:
      maps: Light layers and maps by the first three levels.
      shares: Shares of a prompt that may run light.
      policy: Name of the family.
    """

    maps: dict[Levels, KVMaps]
    shares: tuple[float, ...]
    policy: str = "light"

    def preset(self, levels: Levels, *, lean: bool = False) -> QuickSilverConfig:
        """A share of a prompt runs light from the first layer to the stop."""
        del lean
        first, stop, _, share = levels
        quota: dict[str, Any] = {"rule": "quota", "layers": (stop,), "quota": (1.0,)}
        quota |= {"light_from": first, "light_share": self.shares[share]}
        halting = HaltingConfig(**quota, entropy=None)
        return QuickSilverConfig(halting=halting, kv_skip=KVSkipConfig("extrapolate"))

    def params(self, params: Params, levels: Levels, qs: QuickSilverConfig) -> Params:
        """The parameters with the candidate's maps."""
        del qs
        return {**params, "kv_maps": self.maps[levels[:3]]}


def check_layers(layers: Iterable[int], model: ModelConfig) -> tuple[int, ...]:
    """The layers in rising order, each once; ConfigError unless all leave some to save."""
    rising, deepest = tuple(sorted(set(layers))), model.num_layers - 1
    if not rising or rising[0] < 1 or rising[-1] > deepest:
        raise ConfigError(f"layers must be between 1 and {deepest}, got {list(rising)}.")
    return rising


def halting_layers(model: ModelConfig) -> tuple[int, ...]:
    """Layers at `DEPTHS` of the depth, 1 to L - 1, each once."""
    deepest = model.num_layers - 1
    if deepest < 1:
        raise ConfigError("a model of one layer has no layer that a token could leave out.")
    return tuple(sorted({min(max(round(d * model.num_layers), 1), deepest) for d in DEPTHS}))
