"""Named mechanism settings, and presets as JSON files.

`off` is the dense model. `paper` holds the paper's own numbers, scaled to the model's depth; where
the paper gives several, the others are named variants (`NAMES`). `balanced` and `aggressive` are
ours, and act on prompts only: that is where the embedded model forgives.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
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
)
from qs_jax.errors import ConfigError, InputError
from qs_jax.mechanisms.kv_maps import FILE_NAME, KVMaps, select

_FORMAT = "qs-jax preset"
_PAPER_DEPTH = 30
# Fields of a model that a preset made for another does not fit.
_MADE_FOR = ("model_type", "num_layers", "hidden_size", "vocab_size")


def off(model: ModelConfig) -> QuickSilverConfig:
    """Every mechanism off: the dense model."""
    del model
    return QuickSilverConfig()


def paper(
    model: ModelConfig,
    *,
    tau_drift: float = 1.0,
    entropy: str = "latent",
    normalization: str = "nats",
    tau_low: float = 1.0,
    tau_high: float = 2.3,
    execution: str = "int8",
) -> QuickSilverConfig:
    """The paper's numbers, with layers scaled from its 30 to the model's depth.

    Raw drift below 1.0 and logit-lens entropy below 1.15 bits over layers 6 to 24, not before layer
    5; keys of halted tokens skipped; adjacent tokens closer than 0.15 fused from layer 12; bits at
    layer 15 by entropy in nats (1.0, 2.3), in int8. Sources: B.2, G.2 to G.4, FAQ.

    The entropy for the bits is that of the state's own softmax, "over its softmax-normalized latent
    distribution" (2.5, E.1). The logit lens, which other sections of the paper read, costs as much
    as several layers for every token; the variants whose names end in "vocab" keep it, with scales
    for each group, which int8 products cannot have: simulated.

    Args:
      model: Depth and sizes.
      tau_drift: Raw drift; the paper also has 0.045, 1e-3, 0.9 and 1.1.
      entropy: Estimator for AMQ.
      normalization: Of the entropy for AMQ.
      tau_low: Of AMQ; 0.3 with "minmax", 0.25 with "log_vocab".
      tau_high: Of AMQ; 0.6 and 0.65.
      execution: Of AMQ.
    """
    layers = model.num_layers

    def at(layer: int) -> int:
        return min(max(round(layer / _PAPER_DEPTH * layers), 1), max(layers - 1, 1))

    first, last = at(6), at(24)
    return QuickSilverConfig(
        halting=HaltingConfig(
            tau_drift=tau_drift,
            tau_halt=1.15 * 0.6931471805599453,
            window=(first, last),
            min_layer=min(at(5), last),
        ),
        kv_skip=KVSkipConfig(policy="skip"),
        fusion=FusionConfig(tau_fuse=0.15, first_layer=at(12)),
        amq=AMQConfig(
            layer=at(15),
            entropy=entropy,
            normalization=normalization,
            tau_low=tau_low,
            tau_high=tau_high,
            group=_group(model),
            execution=execution,
        ),
        provenance={
            "source": "QuickSilver paper, sections B.2, C, D.3, E, G.2 to G.4",
            "calibrated_on": None,
        },
    )


def balanced(model: ModelConfig) -> QuickSilverConfig:
    """Prompts only: most of a prompt stops early, in stages, the least attended tokens first.

    For the embedded SmolLM2-135M-Instruct this is what `python -m qs_jax calibrate` found within
    0.2 of the dense perplexity, with the record of its verification; it reads `shipped_maps`, which
    `qs_jax.load` puts into the parameters of that checkpoint. For any other model it is a starting
    point, not a promise: the least attended half of a prompt stops at 0.8 of the depth and its keys
    are skipped from there on.
    """
    if _is_shipped(model):
        return load(SHIPPED_PRESET, model)
    layers = _layers(model, 0.8)
    return QuickSilverConfig(
        halting=HaltingConfig(rule="quota", layers=layers, quota=(0.5,), entropy=None),
        kv_skip=KVSkipConfig(policy="skip"),
        provenance=_SHIPPED,
    )


def aggressive(model: ModelConfig) -> QuickSilverConfig:
    """Prompts only: all four mechanisms, for savings whose price shows in the perplexity.

    Half of the prompt stops at two thirds of the depth and nearly all of it at 0.9, keys of halted
    tokens are skipped, near-identical neighbours fuse, and products are in int8 from the middle on.
    The measured cost is in docs/mechanisms.md.
    """
    layers = _layers(model, 2 / 3, 0.9)
    middle = max(model.num_layers // 2, 1)
    return QuickSilverConfig(
        halting=HaltingConfig(
            rule="quota", layers=layers, quota=_shares(layers, 0.5, 0.9), entropy=None
        ),
        kv_skip=KVSkipConfig(policy="skip"),
        fusion=FusionConfig(tau_fuse=0.35, distance="relative", first_layer=middle),
        amq=AMQConfig.uniform(8, layer=middle, group=_group(model), execution="int8"),
        provenance=_SHIPPED,
    )


def shipped_maps(model: ModelConfig) -> KVMaps | None:
    """Extrapolation maps that come with the library: those of `balanced` for the embedded model.

    Put them into `params["kv_maps"]`; `qs_jax.load` does. None for a model of other sizes.
    """
    path = shipped_path(model)
    return None if path is None else KVMaps.load(path)


def shipped_path(model: ModelConfig) -> Path | None:
    """The file of `shipped_maps`."""
    path = maps_path(SHIPPED_PRESET)
    return path if _is_shipped(model) and path.exists() else None


def maps_path(preset: Path) -> Path:
    """Where the maps of a preset file are."""
    return preset.with_name(f"{preset.stem}.kv_maps.safetensors")


SHIPPED_PRESET = Path(__file__).parent / "shipped" / "smollm2-135m-instruct.json"


@functools.cache
def _made_for() -> dict[str, Any]:
    provenance = json.loads(SHIPPED_PRESET.read_text(encoding="utf-8"))["provenance"]
    return {name: provenance[name] for name in _MADE_FOR}


def _is_shipped(model: ModelConfig) -> bool:
    return {name: getattr(model, name) for name in _MADE_FOR} == _made_for()


_SHIPPED: Mapping[str, Any] = {
    "source": "shipped with qs-jax",
    "chosen_on": "SmolLM2-135M-Instruct, WikiText-103 validation, 16 windows of 512, continuation",
}


_LENS: dict[str, Any] = {"entropy": "vocab", "execution": "fake"}

# Every preset by name; the paper's other values are its variants, with the logit lens for the bits.
NAMES: dict[str, Callable[[ModelConfig], QuickSilverConfig]] = {
    "off": off,
    "paper": paper,
    "balanced": balanced,
    "aggressive": aggressive,
    "paper-drift-0.045": functools.partial(paper, tau_drift=0.045, **_LENS),  # B.2
    "paper-drift-0.001": functools.partial(paper, tau_drift=1e-3, **_LENS),  # G.2
    "paper-drift-0.9": functools.partial(paper, tau_drift=0.9, **_LENS),  # FAQ
    "paper-drift-1.1": functools.partial(paper, tau_drift=1.1, **_LENS),  # FAQ
    "paper-bits-minmax": functools.partial(  # E.2
        paper, normalization="minmax", tau_low=0.3, tau_high=0.6, **_LENS
    ),
    "paper-bits-vocab": functools.partial(paper, **_LENS),  # B.1
    "paper-bits-log-vocab": functools.partial(  # O
        paper, normalization="log_vocab", tau_low=0.25, tau_high=0.65, **_LENS
    ),
}


def by_name(name: str | os.PathLike[str], model: ModelConfig) -> QuickSilverConfig:
    """The preset called `name`, or read from the JSON file of that name.

    Raises:
      ConfigError: There is neither, or it does not fit the model.
    """
    name = os.fspath(name)
    if name in NAMES:
        return NAMES[name](model)
    if name.endswith(".json") or os.sep in name:
        return load(name, model)
    raise ConfigError(f"unknown preset {name!r}; known: {', '.join(NAMES)}, or a FILE.json.")


def save(
    path: str | Path, quicksilver: QuickSilverConfig, model: ModelConfig | None = None
) -> Path:
    """Write a preset with its provenance as JSON.

    Args:
      path: File to write.
      quicksilver: Settings; `provenance` goes along.
      model: Notes the architecture it was made for, so that `load` can refuse another.
    """
    path, fields = Path(path), quicksilver.to_dict()
    provenance = fields.pop("provenance")
    if model is not None:
        provenance |= {name: getattr(model, name) for name in _MADE_FOR}
    content = {"format": _FORMAT, "version": 1, "quicksilver": fields, "provenance": provenance}
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def load(path: str | Path, model: ModelConfig) -> QuickSilverConfig:
    """Read a preset written by `save`.

    Raises:
      ConfigError: It cannot be read, is of another format or model, or does not fit.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the preset {path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ConfigError(f"{path} is not a preset: it has no format {_FORMAT!r}.")
    for part in ("quicksilver", "provenance"):
        if not isinstance(content.get(part, {}), dict):
            raise ConfigError(f"{path} is not a preset: its {part} is not an object.")
    if content.get("version") != 1:
        raise ConfigError(f"{path} is a preset of version {content.get('version')}, known: 1.")
    provenance = content.get("provenance", {})
    for name in _MADE_FOR:
        made_for = provenance.get(name)
        if made_for is not None and made_for != getattr(model, name):
            raise ConfigError(
                f"{path} was made for a model with {name} {made_for}, this one has "
                f"{getattr(model, name)}."
            )
    if "quicksilver" not in content:
        raise ConfigError(f"{path} is not a preset: it has no quicksilver settings.")
    quicksilver = QuickSilverConfig.from_dict(content["quicksilver"])
    quicksilver = dataclasses.replace(quicksilver, provenance=provenance)
    quicksilver.check(model, "teacher-forced" if not quicksilver.prompts_only else "continuation")
    return quicksilver


def _group(model: ModelConfig) -> int:
    """The largest group up to 16 channels that divides every width."""
    widths = (model.hidden_size, model.q_size, model.mlp_size, model.head_dim)
    return next(g for g in (16, 8, 4, 2, 1) if all(width % g == 0 for width in widths))


def _layers(model: ModelConfig, *fractions: float) -> tuple[int, ...]:
    deepest = max(model.num_layers - 1, 1)
    return tuple(sorted({min(max(round(f * model.num_layers), 1), deepest) for f in fractions}))


def _shares(layers: tuple[int, ...], *shares: float) -> tuple[float, ...]:
    """One share a layer: in a shallow model two fractions of the depth can be one layer."""
    return shares[: len(layers)]


def find_maps(
    cfg: Config, ckpt: Path, given: Path | None, preset: str = ""
) -> tuple[KVMaps | None, str | None]:
    """The maps of the configuration's halting layers, if its policy reads any.

    Args:
      cfg: Its `kv_skip.policy` decides.
      ckpt: Checkpoint folder, where the maps are unless the preset has its own.
      given: Another file, or None.
      preset: The preset's name or file; `calibrate` writes its maps beside it, and `balanced` has
        its own.

    Returns:
      The maps and the file's SHA-256, or None twice.

    Raises:
      CheckpointError: There is no such file.
      ConfigError: The maps are of other layers or another model.
      InputError: A file was given though the policy reads none.
    """
    qs = cfg.quicksilver
    if qs is None or qs.kv_skip is None or qs.kv_skip.policy != "extrapolate":
        if given is not None:
            raise InputError("--kv-maps is for presets whose kv_skip.policy is 'extrapolate'.")
        return None, None
    assert qs.halting is not None
    assert qs.halting.layers is not None
    own = maps_path(Path(preset)) if preset.endswith(".json") else None
    if preset == "balanced":
        own = shipped_path(cfg.model)
    path = given or (own if own is not None and own.exists() else ckpt / FILE_NAME)
    path = path / FILE_NAME if path.is_dir() else path
    maps = select(KVMaps.load(path), qs.halting.layers)
    maps.check(cfg.model)
    return maps, hashlib.sha256(path.read_bytes()).hexdigest()
