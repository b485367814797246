"""What a report holds, gathered in one value, and the same as JSON for the page."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from qs_jax import accounting
from qs_jax.config import Config, ModelConfig, QuickSilverConfig
from qs_jax.evaluation.perplexity import SAVED
from qs_jax.mechanisms.kv_maps import MapSizes
from qs_jax.mechanisms.signals import largest_entropy
from qs_jax.report.measures import COMPONENTS, active_tokens, costs, fit_decay
from qs_jax.report.trace import Run, letters_of, signal_names

# Signals of a page, in numbers: up to the first in float32, beyond in float16; beyond the second,
# only the dense model and the whole preset have them.
EXACT_NUMBERS = 1_500_000
MOST_NUMBERS = 6_000_000
# Bits of a cell's code: see `cell_codes`.
ACTIVE, WRITTEN, HELD, WEIGHED = 1, 2, 4, 8
BITS = (16, 8, 4, 2)


@dataclasses.dataclass(frozen=True)
class PresetRuns:
    """A preset and its runs.

    Attributes:
      name: As given.
      cfg: The call with everything on.
      runs: Of `trace`, the dense model first and the whole preset last.
      map_sizes: Of the extrapolation maps, where it reads them.
    """

    name: str
    cfg: Config
    runs: Sequence[Run]
    map_sizes: MapSizes | None = None

    @property
    def quicksilver(self) -> QuickSilverConfig:
        """The preset."""
        return self.cfg.quicksilver or QuickSilverConfig()


@dataclasses.dataclass(frozen=True)
class TextRuns:
    """A text and the presets it ran under.

    Attributes:
      ids: Token ids, one row.
      labels: What to write for each.
      prompt_length: Tokens of the prompt; 0 under "teacher-forced".
      presets: At least one.
    """

    ids: Int[np.ndarray, "T"]
    labels: Sequence[str]
    prompt_length: int
    presets: Sequence[PresetRuns]


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a report shows.

    Attributes:
      title: Of the page.
      about: Where it comes from: name and value of each fact.
      text: A text under presets, or None.
      results: Results files of `evaluate`, as `files.read_results` gives them.
      front: A search of `calibrate`, as `files.read_front` gives it, or None.
    """

    title: str
    about: dict[str, str]
    text: TextRuns | None = None
    results: Sequence[dict[str, Any]] = ()
    front: dict[str, Any] | None = None


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain JSON types; arrays are entries of "arrays" (see `Pool`)."""
    pool = Pool()
    text = None if report.text is None else _text(report.text, pool)
    return {
        "title": report.title,
        "about": report.about,
        "text": text,
        "results": list(report.results),
        "front": report.front,
        "components": COMPONENTS,
        "arrays": pool.arrays,
    }


def _text(text: TextRuns, pool: Pool) -> dict[str, Any]:
    width, model = len(text.ids), text.presets[0].cfg.model
    every = sum(len(preset.runs) * _numbers(preset, width) for preset in text.presets)
    dtype = np.float32 if every <= EXACT_NUMBERS else np.float16
    return {
        "labels": list(text.labels),
        "ids": pool.add(text.ids.astype(np.int32)),
        "tokens": width,
        "layers": model.num_layers,
        "prompt": text.prompt_length,
        "protocol": text.presets[0].cfg.effective_protocol,
        "precision": np.dtype(dtype).name,
        "presets": [
            _preset(preset, pool, dtype, everywhere=every <= MOST_NUMBERS)
            for preset in text.presets
        ],
    }


def _numbers(preset: PresetRuns, width: int) -> int:
    return len(signal_names(preset.quicksilver)) * preset.cfg.model.num_layers * width


def _preset(preset: PresetRuns, pool: Pool, dtype: Any, everywhere: bool) -> dict[str, Any]:
    qs, model = preset.quicksilver, preset.cfg.model
    last = preset.runs[-1].letters
    return {
        "name": preset.name,
        "letters": letters_of(qs),
        "signals": signal_names(qs),
        "thresholds": thresholds(qs, model),
        "settings": qs.to_dict(),
        "runs": {
            run.letters: _run(run, preset, pool, dtype, everywhere or run.letters in ("", last))
            for run in preset.runs
        },
    }


def _run(
    run: Run, preset: PresetRuns, pool: Pool, dtype: Any, with_signals: bool
) -> dict[str, Any]:
    record, model = run.record, preset.cfg.model
    counted = accounting.tally(record, model, run.quicksilver, preset.map_sizes)
    saved = accounting.summary(counted)
    active_L = active_tokens(record)
    layers = model.num_layers
    subject = record.subject[0]
    shown = {
        "cells": cell_codes(run),
        "depth": record.depth[0].astype(np.uint16),
        "visible": record.visible_keys[:, 0].astype(np.uint16),
        "fused": fused_changes(record.fused[:, 0]),
        "logprobs": run.logprobs.astype(np.float32),
        "scored": run.mask.astype(np.uint8),
        "subject": subject.astype(np.uint8),
    }
    if with_signals:
        shown |= {name: array.astype(dtype) for name, array in run.signals.items()}
    own = np.arange(record.depth.shape[1])
    return {
        "letters": run.letters,
        "arrays": {name: pool.add(array) for name, array in shown.items()},
        "active": active_L.tolist(),
        "decay": dataclasses.asdict(fit_decay(active_L)),
        "costs": costs(record, model, run.quicksilver, preset.map_sizes),
        "summary": {
            "perplexity": finite(run.perplexity),
            "scored": int(run.mask.sum()),
            "subject": int(subject.sum()),
            "halted": int((record.depth[0] < layers).sum()),
            "fused": int((record.fused[-1, 0] != own).sum()),
            "mean_depth": float(record.active.sum() / record.depth.shape[1]),
            **{name: saved[name] for name in (*SAVED, "added_flops_share")},
        },
    }


def finite(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return float(value) if np.isfinite(value) else None


def cell_codes(run: Run) -> np.ndarray:
    """One byte for each (layer, token), `[L, T]`: four flags, and the place of its bits in BITS."""
    record = run.record
    flags = {ACTIVE: record.active, WRITTEN: record.kv_written, HELD: record.kv_held}
    flags[WEIGHED] = record.weighed
    code = sum(np.where(where[:, 0], flag, 0) for flag, where in flags.items())
    place = sum(np.where(record.bits[:, 0] == bits, i, 0) for i, bits in enumerate(BITS))
    return np.asarray(code + 16 * place, np.uint8)


def fused_changes(fused_LT: Int[np.ndarray, "L T"]) -> Int[np.ndarray, "n 3"]:
    """Where a token's representative changes: rows of (layer, token, representative).

    Layers count from 1. A change at layer l is of a fusion at the end of layer l - 1.
    """
    own = np.arange(fused_LT.shape[1])[None]
    before = np.concatenate([own, fused_LT[:-1]])
    layer, token = np.nonzero(fused_LT != before)
    return np.stack([layer + 1, token, fused_LT[layer, token]], axis=1).astype(np.int32)


def thresholds(qs: QuickSilverConfig, model: ModelConfig) -> dict[str, Any]:
    """What decisions compare signals with; None where a mechanism is off or compares nothing.

    Returns:
      "drift" and "halt" (nats): a number for each layer where the dual rule may halt, else None;
      "halting_layers", "fusion_layers" and "bits_layer"; "bits" (nats), the two thresholds.
    """
    layers = model.num_layers
    found: dict[str, Any] = dict.fromkeys(
        ["drift", "halt", "halting_layers", "fusion_layers", "bits", "bits_layer"]
    )
    if qs.halting is not None:
        may = qs.halting.may_halt(layers)
        found["halting_layers"] = (np.flatnonzero(may) + 1).tolist()
        if qs.halting.rule == "dual":
            found["drift"] = _where(qs.halting.tau_drift, may)
            if qs.halting.entropy is not None:
                found["halt"] = _where(qs.halting.tau_halt, may)
    if qs.fusion is not None:
        found["fusion_layers"] = [qs.fusion.first_layer, qs.fusion.last_layer or layers - 1]
    if qs.amq is not None:
        found["bits_layer"] = qs.amq.layer
        found["bits"] = _bit_thresholds(qs, model)
    return found


def _where(tau: Any, may: np.ndarray) -> list[float | None]:
    values = np.broadcast_to(np.asarray(tau, np.float64), may.shape)
    return [finite(value) if here else None for value, here in zip(values, may, strict=True)]


def _bit_thresholds(qs: QuickSilverConfig, model: ModelConfig) -> list[float] | None:
    amq = qs.amq
    assert amq is not None
    if amq.entropy is None or amq.normalization == "minmax":
        return None
    unit = 1.0
    if amq.normalization == "log_vocab":
        unit = largest_entropy(amq.entropy, model, qs.shortlist_size)
    return [amq.tau_low * unit, amq.tau_high * unit]


_KINDS = {"uint8": "u1", "uint16": "u2", "int32": "i4", "float16": "f2", "float32": "f4"}


class Pool:
    """Arrays of a report: little-endian numbers, deflated, in base 64; equal ones are stored once.

    Attributes:
      arrays: What goes into the page: {"kind", "shape", "data"}.
    """

    def __init__(self) -> None:
        self.arrays: list[dict[str, Any]] = []
        self._places: dict[str, int] = {}

    def add(self, array: np.ndarray) -> int:
        """Store an array of one of the known dtypes; returns its place in `arrays`."""
        kind = _KINDS[array.dtype.name]
        raw = np.ascontiguousarray(array, dtype="<" + kind).tobytes()
        key = hashlib.sha256(f"{kind}{array.shape}".encode() + raw).hexdigest()
        if key not in self._places:
            # Bytes of one significance next to each other compress better.
            planes = np.frombuffer(raw, np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()
            data = base64.b64encode(zlib.compress(planes, 6)).decode("ascii")
            self._places[key] = len(self.arrays)
            self.arrays.append({"kind": kind, "shape": list(array.shape), "data": data})
        return self._places[key]
