"""A report as one value, as JSON, and as one self-contained HTML file."""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Bool, Int
from markupsafe import Markup

from qs_jax import accounting
from qs_jax.config import Config, QuickSilverConfig
from qs_jax.evaluation.perplexity import SAVED
from qs_jax.files import write_whole
from qs_jax.mechanisms.kv_maps import MapSizes
from qs_jax.mechanisms.signals import largest_entropy
from qs_jax.record import Record
from qs_jax.report.measures import COMPONENTS, active_tokens, costs, fit_decay
from qs_jax.report.trace import Run, letters_of, signal_names
from qs_jax.state import FULL_BITS

_SCRIPTS = ("data.js", "svg.js", "maps.js", "text.js", "charts.js", "app.js")


@dataclasses.dataclass(frozen=True)
class PresetRuns:
    """A preset and its runs, the dense model first and the whole preset last.

    Attributes:
      cfg: The call with everything on.
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
    """A text of one row, the labels to write for its tokens, and the presets it ran under."""

    ids: Int[np.ndarray, "T"]
    labels: Sequence[str]
    presets: Sequence[PresetRuns]


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a report shows.

    Attributes:
      about: Where it comes from: name and value of each fact.
      results: Results files of `evaluate`, of `read_results`.
      front: A search of `calibrate`, of `read_front`.
    """

    title: str
    about: dict[str, str]
    text: TextRuns | None = None
    results: Sequence[dict[str, Any]] = ()
    front: dict[str, Any] | None = None


def write(report: Report, path: Path) -> Path:
    """Write the page as one file, whole or not at all."""
    with write_whole(path) as (staged,):
        staged.write_text(render(report), encoding="utf-8", errors="replace")
    return path


def render(report: Report) -> str:
    """The page as text: template, style, script and data in it, nothing from elsewhere."""
    folder, content = resources.files("qs_jax.report") / "page", to_json(report)

    def read(name: str) -> Markup:
        return Markup((folder / name).read_text(encoding="utf-8"))

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(str(read("report.html.jinja"))).render(
        content=content,
        style=read("style.css"),
        script=Markup("\n").join(map(read, _SCRIPTS)),
        data=embedded(content),
    )
    return page.lstrip()


def embedded(content: dict[str, Any]) -> Markup:
    """JSON that is safe inside a script element: no character HTML or a script could act on."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)  # ASCII only
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain JSON types; an array is its place in "arrays"."""
    arrays: dict[tuple[str, str], int] = {}

    def store(array: np.ndarray) -> int:
        return arrays.setdefault(packed(array), len(arrays))

    return {
        "title": report.title,
        "about": report.about,
        "text": None if report.text is None else _text(report.text, store),
        "results": list(report.results),
        "front": report.front,
        "components": COMPONENTS,
        "arrays": list(arrays),
    }


def _text(text: TextRuns, store: Callable[[np.ndarray], int]) -> dict[str, Any]:
    presets = [
        {
            "name": preset.name,
            "letters": letters_of(preset.quicksilver),
            "signals": signal_names(preset.quicksilver),
            "thresholds": thresholds(preset),
            "settings": preset.quicksilver.to_dict(),
            "runs": {run.letters: _run(run, preset, store) for run in preset.runs},
        }
        for preset in text.presets
    ]
    size = {"tokens": len(text.ids), "layers": text.presets[0].cfg.model.num_layers}
    return {"labels": list(text.labels), "ids": store(text.ids), **size, "presets": presets}


def _run(run: Run, preset: PresetRuns, store: Callable[[np.ndarray], int]) -> dict[str, Any]:
    record, model, sizes = run.record, preset.cfg.model, preset.map_sizes
    counted = accounting.tally(record, model, run.quicksilver, sizes)
    saved, idle = accounting.summary(counted), accounting.is_idle(counted)
    active_L, subject_T = active_tokens(record), record.subject[0]
    eligible_T = subject_T & ~_exempt(record, preset.quicksilver)
    continues = record.protocol == "continuation"
    prompts = record.prompt_lengths if continues else ()
    arrays = {
        "ran": record.active[:, 0],
        "written": record.kv_written[:, 0],
        "held": record.kv_held[:, 0],
        "merged": record.weighed[:, 0],
        "bits": record.bits[:, 0],
        "visible": record.visible_keys[:, 0],
        "fused": record.fused[:, 0],
        "depth": record.depth[0],
        "eligible": eligible_T,
        "scored": run.mask,
        "logprobs": run.logprobs,
    }
    return {
        "arrays": {name: store(array) for name, array in arrays.items()},
        "signals": {name: store(array) for name, array in run.signals.items()},
        "active": active_L.tolist(),
        "decay": fit_decay(active_L),
        "costs": costs(record, model, run.quicksilver, sizes),
        "summary": {
            "perplexity": finite(run.perplexity),
            "scored": int(run.mask.sum()),
            "subject": int(subject_T.sum()),
            "exempt": int((subject_T & ~eligible_T).sum()),
            "halted": int((record.depth[0] < model.num_layers).sum()),
            "fused": int((record.fused[-1, 0] != np.arange(len(subject_T))).sum()),
            "light": _light_layers(run.quicksilver),
            "quantised": int((record.bits[-1, 0] < FULL_BITS).sum()),
            "idle": run.quicksilver.explain_idle(prompts) if idle and run.letters else None,
            "mean_depth": float(record.active.sum() / len(subject_T)),
            **{name: saved[name] for name in (*SAVED, "added_flops_share")},
        },
    }


def _exempt(record: Record, qs: QuickSilverConfig) -> Bool[np.ndarray, "T"]:
    """Tokens of the row that mechanisms leave alone for their position."""
    pos = np.arange(record.depth.shape[1])
    prompt = int(record.prompt_lengths[0])
    recent = int(qs.recent_of(np.array(prompt))) if record.protocol == "continuation" else 0
    return (pos < qs.sink_tokens) | (recent > 0) & (pos >= prompt - recent)


def _light_layers(qs: QuickSilverConfig) -> list[int] | None:
    """The first and the last layer of which halted tokens ran a smaller one."""
    halting = qs.halting
    if halting is None or halting.light_from is None or halting.layers is None:
        return None
    return [halting.light_from, halting.layers[0]]


def finite(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return float(value) if np.isfinite(value) else None


def thresholds(preset: PresetRuns) -> dict[str, list[Any] | None]:
    """What a preset compares signals with: drift and entropy by layer, the two cutoffs of bits."""
    qs, model = preset.quicksilver, preset.cfg.model
    limits: dict[str, list[Any] | None] = dict.fromkeys(["drift", "halt", "bits"])
    if qs.halting is not None and qs.halting.rule == "dual":
        may_L = qs.halting.may_halt(model.num_layers)
        limits["drift"] = [finite(x) for x in np.where(may_L, qs.halting.tau_drift, np.nan)]
        if qs.halting.entropy is not None:
            limits["halt"] = [finite(x) for x in np.where(may_L, qs.halting.tau_halt, np.nan)]
    amq = qs.amq
    if amq is not None and amq.entropy is not None and amq.normalization != "minmax":
        share = amq.normalization == "log_vocab"
        unit = largest_entropy(amq.entropy, model, qs.shortlist_size) if share else 1.0
        limits["bits"] = [amq.tau_low * unit, amq.tau_high * unit]
    return limits


def packed(array: np.ndarray) -> tuple[str, str]:
    """The kind of an array ("u1", "i4" or "f4"), and its numbers deflated, in base 64."""
    kind = {"b": "u1", "f": "f4"}.get(array.dtype.kind, "i4")
    raw = np.ascontiguousarray(array, dtype="<" + kind)
    # Bytes of one significance next to each other compress better.
    planes = raw.reshape(-1, 1).view(np.uint8).T.tobytes()
    return kind, base64.b64encode(zlib.compress(planes, 6)).decode("ascii")
