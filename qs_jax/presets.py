"""Named mechanism settings, and presets as JSON files.

`off` is the dense model. `paper` holds the paper's own numbers, scaled to the model's depth; where
the paper gives several, the others are named variants (`NAMES`). `balanced`, `fast-answers` and
`small-cache` are ours: they leave work out of prompts only, which forgive more.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qs_jax.config import (
    AMQConfig,
    Config,
    FusionConfig,
    HaltingConfig,
    KVSkipConfig,
    ModelConfig,
    QuickSilverConfig,
    Speculation,
)
from qs_jax.errors import ConfigError
from qs_jax.files import read_json, write_json

_FOLDER = Path(__file__).parent / "shipped"
# Presets that `calibrate` made for the embedded model; maps they read are beside them.
SHIPPED: Mapping[str, Path] = {
    "balanced": _FOLDER / "smollm2-135m-instruct.json",
    "small-cache": _FOLDER / "smollm2-135m-instruct.small-cache.json",
}
_SHIPPED: Mapping[str, Any] = {
    "source": "shipped with qs-jax",
    "chosen_on": "SmolLM2-135M-Instruct, WikiText-103 validation, 16 windows of 512, continuation",
}
# The one name that also says how new tokens are generated: see `config`.
FAST_ANSWERS = "fast-answers"
_FORMAT = "qs-jax preset"
# A preset made for a model fits neither one in which any of these differs, nor other weights.
_MADE_FOR = ("model_type", "num_layers", "hidden_size", "vocab_size")


def off(_: ModelConfig) -> QuickSilverConfig:
    """Every mechanism off: the dense model."""
    return QuickSilverConfig()


def paper(model: ModelConfig, *, tau_drift: float = 1.0, **amq: Any) -> QuickSilverConfig:
    """The paper's numbers, with layers scaled from its 30 to the model's depth.

    Raw drift below 1.0 and logit-lens entropy below 1.15 bits over layers 6 to 24, not before layer
    5; keys of halted tokens skipped; adjacent tokens closer than 0.15 fused from layer 12; bits at
    layer 15 by entropy in nats (1.0, 2.3), in int8. Sources: B.2, G.2 to G.4, FAQ.

    The entropy for the bits is that of the state's own softmax (2.5, E.1). Other sections read the
    logit lens, which costs as much as several layers for every token. The variants of this preset
    do so too, with a scale for each group, which int8 products cannot have: simulated.

    Args:
      model: Depth and sizes.
      tau_drift: Raw drift; the paper also has 0.045, 1e-3, 0.9 and 1.1.
      amq: Fields of `AMQConfig` that differ.
    """
    first, last = _layer(model, 0.2), _layer(model, 0.8)
    halting = HaltingConfig(
        tau_drift=tau_drift,
        tau_halt=1.15 * math.log(2),
        window=(first, last),
        min_layer=min(_layer(model, 5 / 30), last),
    )
    fusion = FusionConfig(tau_fuse=0.15, first_layer=_layer(model, 0.4))
    amq = {"entropy": "latent", "execution": "int8", "group": group(model)} | amq
    bits = AMQConfig(layer=_layer(model, 0.5), **amq)
    about = {"source": "QuickSilver paper, sections B.2, C, D.3, E, G.2 to G.4"}
    return QuickSilverConfig(halting, KVSkipConfig(), fusion, bits, provenance=about)


def balanced(model: ModelConfig) -> QuickSilverConfig:
    """Prompts only: a prompt runs light layers from the middle on, and stops before the end.

    For the embedded SmolLM2-135M-Instruct, `python -m qs_jax calibrate` verified it within 0.2 of
    the dense perplexity. It reads maps that come with the library; `qs_jax.load` adds them to that
    checkpoint. Other weights of the same sizes are refused. For any other model it is a starting
    point, not a promise: the least attended half of a prompt stops at 0.8 of the depth and its keys
    are skipped from there on.
    """
    if _has_shipped_sizes(model):
        return load(SHIPPED["balanced"], model)
    return QuickSilverConfig(quota(model, {0.8: 0.5}), KVSkipConfig(), provenance=_SHIPPED)


def fast_answers(model: ModelConfig) -> QuickSilverConfig:
    """The prompt as under `balanced`; with `config`, answers are drafted and verified.

    A draft changes no token, so the price is that of `balanced`.
    """
    return balanced(model)


def small_cache(model: ModelConfig) -> QuickSilverConfig:
    """KV caches in fewer bytes: int8 keys and values, and none of a prompt's least attended tokens.

    For the embedded SmolLM2-135M-Instruct, `python -m qs_jax calibrate --objective kv_bytes`
    verified it within 0.2 of the dense perplexity. For any other model it is a starting point, not
    a promise: the least attended half of a prompt stops at 0.8 of the depth, as under `balanced`.
    """
    if _has_shipped_sizes(model):
        return load(SHIPPED["small-cache"], model)
    halting = quota(model, {0.8: 0.5})
    return QuickSilverConfig(halting, KVSkipConfig(), amq=int8_cache(model), provenance=_SHIPPED)


def unverified(quicksilver: QuickSilverConfig, tokens: int) -> str | None:
    """One line that says a calibrated preset was not verified at a length; None where it was.

    A length at which it was verified covers those down to half of it.
    """
    verified = quicksilver.provenance.get("verified", {})
    lengths = verified.get("lengths", {str(quicksilver.provenance.get("seq_len", 0)): {}})
    held = [int(n) for n, entry in lengths.items() if entry.get("within_budget", True)]
    if quicksilver.is_off or not verified or any(n < 2 * tokens <= 2 * n for n in held):
        return None
    at = ", ".join(f"{n:,}" for n in sorted(held)) or "any length"
    return f"this preset was verified at {at} tokens, not at {tokens:,}: evaluate it there."


def shipped_maps(model: ModelConfig, preset: str = "balanced") -> Path | None:
    """The file of the maps a shipped preset reads; None for others, other sizes or weights."""
    path = SHIPPED.get("balanced" if preset == FAST_ANSWERS else preset)
    fits = _has_shipped_sizes(model) and model.has_weights(_made_for()["weights"])
    if path is None or not fits or not maps_path(path).exists():
        return None
    return maps_path(path)


def _has_shipped_sizes(model: ModelConfig) -> bool:
    return all(getattr(model, name) == _made_for()[name] for name in _MADE_FOR)


def _made_for() -> dict[str, Any]:
    """Sizes and weights of the embedded model, for which all shipped presets were made."""
    return read_json(SHIPPED["balanced"])["provenance"]


def maps_path(preset: Path) -> Path:
    """Where the extrapolation maps of a preset file are."""
    return preset.parent / f"{preset.stem}.kv_maps.safetensors"


def _layer(model: ModelConfig, fraction: float) -> int:
    """The layer at a fraction of the depth, of those that leave one to save."""
    return min(max(round(fraction * model.num_layers), 1), max(model.num_layers - 1, 1))


def quota(model: ModelConfig, shares: Mapping[float, float]) -> HaltingConfig:
    """Shares of a prompt that have stopped, by fraction of the depth; the least attended first."""
    stops: dict[int, float] = {}
    for fraction, share in shares.items():  # in a shallow model two can be one layer
        stops.setdefault(_layer(model, fraction), share)
    return HaltingConfig(
        rule="quota", layers=tuple(stops), quota=tuple(stops.values()), entropy=None
    )


def int8_cache(model: ModelConfig) -> AMQConfig:
    """Keys and values in int8 from the second layer on, with one scale a head."""
    return AMQConfig.uniform(8, layer=1, targets=("kv",), group=group(model), execution="int8")


def group(model: ModelConfig) -> int:
    """The largest group up to 16 channels that divides every width."""
    widths = (model.hidden_size, model.q_size, model.mlp_size, model.head_dim)
    return next(g for g in (16, 8, 4, 2, 1) if all(width % g == 0 for width in widths))


_LENS: dict[str, Any] = {"entropy": "vocab", "execution": "fake"}
_MINMAX = {"normalization": "minmax", "tau_low": 0.3, "tau_high": 0.6}
_LOG_VOCAB = {"normalization": "log_vocab", "tau_low": 0.25, "tau_high": 0.65}

# Every preset by name; the paper's other values are its variants, with the logit lens for the bits.
NAMES: dict[str, Callable[[ModelConfig], QuickSilverConfig]] = {
    "off": off,
    "paper": paper,
    "balanced": balanced,
    FAST_ANSWERS: fast_answers,
    "small-cache": small_cache,
    "paper-drift-0.045": functools.partial(paper, tau_drift=0.045, **_LENS),  # B.2
    "paper-drift-0.001": functools.partial(paper, tau_drift=1e-3, **_LENS),  # G.2
    "paper-drift-0.9": functools.partial(paper, tau_drift=0.9, **_LENS),  # FAQ
    "paper-drift-1.1": functools.partial(paper, tau_drift=1.1, **_LENS),  # FAQ
    "paper-bits-minmax": functools.partial(paper, **_MINMAX, **_LENS),  # E.2
    "paper-bits-vocab": functools.partial(paper, **_LENS),  # B.1
    "paper-bits-log-vocab": functools.partial(paper, **_LOG_VOCAB, **_LENS),  # O
}


def by_name(name: str | os.PathLike[str], model: ModelConfig) -> QuickSilverConfig:
    """The preset called `name`, or read from the JSON file of that name."""
    name = os.fspath(name)
    if name in NAMES:
        return NAMES[name](model)
    if name.endswith(".json") or os.sep in name:
        return load(name, model)
    raise ConfigError(f"unknown preset {name!r}; known: {', '.join(NAMES)}, or a FILE.json.")


def config(name: str | os.PathLike[str], model: ModelConfig, **settings: Any) -> Config:
    """A call under a preset: its mechanisms, and what else it says; `settings` come first."""
    if os.fspath(name) == FAST_ANSWERS:
        settings = {"speculate": Speculation()} | settings
    return Config(model, by_name(name, model), **settings)


def save(
    path: str | Path, quicksilver: QuickSilverConfig, model: ModelConfig | None = None
) -> Path:
    """Write a preset with its provenance as JSON, whole or not at all.

    Args:
      path: File to write.
      quicksilver: Settings.
      model: The architecture and weights it was made for; `load` then refuses others.

    Raises:
      ConfigError: A score or policy of your own is not what its "module:name" imports.
    """
    path, fields = Path(path), quicksilver.to_dict()
    try:
        QuickSilverConfig.from_dict(fields)
    except ConfigError as error:
        raise ConfigError(
            "a preset's file holds module:name of a score or policy of your own, which must import "
            "an equal one: use a function, or a frozen dataclass with its default values."
        ) from error
    provenance = fields.pop("provenance")
    if model is not None:
        provenance |= {name: getattr(model, name) for name in (*_MADE_FOR, "weights")}
    content = {"format": _FORMAT, "version": 1, "quicksilver": fields, "provenance": provenance}
    write_json(path, content)
    return path


def load(path: str | Path, model: ModelConfig) -> QuickSilverConfig:
    """Read a preset written by `save`.

    Raises:
      ConfigError: It cannot be read, is of another format, model or weights, or does not fit.
    """
    try:
        content = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the preset {path}: {error}") from error
    content = content if isinstance(content, dict) else {}
    if (content.get("format"), content.get("version")) != (_FORMAT, 1):
        raise ConfigError(f"{path} is not a preset: it has no format {_FORMAT!r}, version 1.")
    fields, provenance = content.get("quicksilver"), content.get("provenance", {})
    if not isinstance(fields, dict) or not isinstance(provenance, dict):
        raise ConfigError(f"{path} is not a preset: it has no quicksilver and provenance objects.")
    for name in _MADE_FOR:
        made_for, here = provenance.get(name), getattr(model, name)
        if made_for not in (None, here):
            raise ConfigError(f"{path} is for models with {name} {made_for}, not {here}.")
    advice = "make a preset for these with `calibrate`"
    model.check_weights(provenance.get("weights"), f"{path} was verified on", advice)
    try:
        quicksilver = QuickSilverConfig.from_dict(fields | {"provenance": provenance})
        quicksilver.check(model, "continuation" if quicksilver.prompts_only else "teacher-forced")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return quicksilver
