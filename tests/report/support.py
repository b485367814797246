"""A small report of a random model, thresholds chosen so that every mechanism acts."""

import base64
import dataclasses
import json
import zlib
from html.parser import HTMLParser
from typing import Any

import numpy as np

from qs_jax import Config, report, testing
from qs_jax.config import AMQConfig, FusionConfig, HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.evaluation.perplexity import results
from qs_jax.report.trace import Run

LAYERS = 6
TEXT = "He did <b>not</b> complain, not at all."
SKIP = {"family": "skip", "saving": 0.1, "ppl_increase": 0.05, "levels": [0]}
EXTRAPOLATE = {"family": "extrapolate", "saving": 0.2, "ppl_increase": 4.0, "levels": [1]}
SEARCH = {
    "preset": {"provenance": {"objective": "exact_flops", "max_ppl_increase": 0.2}},
    "points": [SKIP, EXTRAPOLATE],
    "front": [SKIP],
    "verified": [{"family": "skip", "exact_flops_saved": 0.09, "ppl_increase": 0.1}],
}


@dataclasses.dataclass
class Case:
    params: Any
    cfg: Config
    tokenizer: Any
    ids: np.ndarray
    runs: list[Run]

    def report(self, labels: list[str] | None = None, **changes: Any) -> report.Report:
        labels = labels or report.labels(self.tokenizer, self.ids.tolist())
        presets = [report.PresetRuns("tiny", self.cfg, self.runs)]
        text = report.TextRuns(self.ids, labels, presets)
        fields = {"title": "A tiny report", "about": {"model": "tiny"}, "text": text}
        return report.Report(**(fields | changes))

    def run(self, letters: str) -> Run:
        return next(run for run in self.runs if run.letters == letters)


def make_case() -> Case:
    model = testing.tiny_model(num_layers=LAYERS)
    params, tokenizer = testing.tiny_params(model), testing.toy_tokenizer()
    ids = np.asarray(tokenizer(TEXT).input_ids, np.int32)
    quicksilver = QuickSilverConfig(
        halting=HaltingConfig(drift="relative", tau_drift=0.66, tau_halt=4.2, window=(2, 5)),
        kv_skip=KVSkipConfig(),
        fusion=FusionConfig(tau_fuse=0.8, distance="relative", first_layer=3),
        amq=AMQConfig(layer=3, entropy="latent", tau_low=2.7, tau_high=2.9, group=8),
        sink_tokens=1,
    )
    cfg = Config(model=model, quicksilver=quicksilver, engine="masked", protocol="teacher-forced")
    runs = list(report.trace(params, ids, cfg))
    record = runs[-1].record  # every mechanism acts
    assert (record.depth < LAYERS).any()
    assert (record.fused[-1] != np.arange(len(ids))).any()
    assert {2, 4, 8} & set(np.unique(record.bits[-1]))
    assert not record.kv_written.all()
    return Case(params, cfg, tokenizer, ids, runs)


class Page(HTMLParser):
    """The elements that a browser would see, and the data of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.data: dict[str, Any] = {}
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self._inside = ("id", "qs-data") in attrs

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data = json.loads(data)
            self._inside = False

    def array(self, place: int) -> np.ndarray:
        kind, data = self.data["arrays"][place]
        planes = np.frombuffer(zlib.decompress(base64.b64decode(data)), np.uint8)
        return np.ascontiguousarray(planes.reshape(int(kind[1]), -1).T).view("<" + kind)[:, 0]

    def run(self, letters: str) -> dict[str, Any]:
        """A run with its arrays unpacked, those of layers as `[L, T]`."""
        text = self.data["text"]
        stored = text["presets"][0]["runs"][letters]
        arrays = {k: self.array(v) for k, v in (stored["arrays"] | stored["signals"]).items()}
        rows = {k: v.reshape(-1, text["tokens"]) for k, v in arrays.items()}
        return stored | {k: v if len(v) > 1 else v[0] for k, v in rows.items()}


def written(path, content):
    path.write_text(json.dumps(content))
    return path


def results_file(path, entry, model, **config):
    """What `evaluate` writes, from one scored batch."""
    content = results([entry], engine=None if config["preset"] == "off" else "masked")
    config |= {"data": "toy", "dtype": "float32", "engine": "masked"}
    return written(path, content | {"config": config, "model": {"config": model.to_dict()}})
