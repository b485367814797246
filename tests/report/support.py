"""A small report of a random model, thresholds chosen so that every mechanism acts."""

import base64
import dataclasses
import json
import re
import zlib
from html.parser import HTMLParser
from typing import Any

import numpy as np

from qs_jax import Config, report, testing
from qs_jax.config import (
    AMQConfig,
    FusionConfig,
    HaltingConfig,
    KVSkipConfig,
    ModelConfig,
    QuickSilverConfig,
)
from qs_jax.report.trace import Run

LAYERS = 6
TEXT = "He did <b>not</b> complain, not at all."
KINDS = {"u1": np.uint8, "u2": np.uint16, "i4": np.int32, "f2": np.float16, "f4": np.float32}


@dataclasses.dataclass
class Case:
    params: Any
    model: ModelConfig
    cfg: Config
    tokenizer: Any
    ids: np.ndarray
    runs: list[Run]

    def report(self, labels: list[str] | None = None, **changes: Any) -> report.Report:
        labels = labels or report.labels(self.tokenizer, self.ids.tolist())
        presets = [report.PresetRuns("tiny", self.cfg, self.runs)]
        text = report.TextRuns(self.ids, labels, 0, presets)
        fields = {"title": "A tiny report", "about": {"model": "tiny"}, "text": text}
        return report.Report(**(fields | changes))

    def run(self, letters: str) -> Run:
        return next(run for run in self.runs if run.letters == letters)


def make_case() -> Case:
    model = testing.tiny_model(num_layers=LAYERS)
    params, tokenizer = testing.tiny_params(model), testing.toy_tokenizer()
    ids = np.asarray(tokenizer(TEXT).input_ids, np.int32)
    halting = HaltingConfig(
        drift="relative", tau_drift=0.66, tau_halt=4.2, entropy="vocab", window=(2, 5)
    )
    quicksilver = QuickSilverConfig(
        halting=halting,
        kv_skip=KVSkipConfig(),
        fusion=FusionConfig(tau_fuse=0.8, distance="relative", first_layer=3),
        amq=AMQConfig(layer=3, entropy="latent", tau_low=2.7, tau_high=2.9, group=8),
        sink_tokens=1,
    )
    cfg = Config(model=model, quicksilver=quicksilver, engine="masked", protocol="teacher-forced")
    runs = list(report.trace(params, ids, cfg, every_signal=True))
    return Case(params, model, cfg, tokenizer, ids, runs)


class Page(HTMLParser):
    """What a browser would take for elements, and the data of the page."""

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
        stored = self.data["arrays"][place]
        raw, size = zlib.decompress(base64.b64decode(stored["data"])), int(stored["kind"][1])
        count = len(raw) // size
        joined = bytes(raw[k * count + j] for j in range(count) for k in range(size))
        return np.frombuffer(joined, KINDS[stored["kind"]]).reshape(stored["shape"])

    def run(self, letters: str, preset: int = 0) -> dict[str, Any]:
        stored = self.data["text"]["presets"][preset]["runs"][letters]
        return stored | {name: self.array(place) for name, place in stored["arrays"].items()}


def scripts_of(page: str) -> list[str]:
    return re.findall(r"<script\b", page)
