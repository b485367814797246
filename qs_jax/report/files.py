"""Reads what other commands wrote: results of `evaluate`, searches of `calibrate`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qs_jax.config import ModelConfig
from qs_jax.errors import InputError
from qs_jax.evaluation.perplexity import SAVED
from qs_jax.report.measures import counted_costs, fit_decay

_CONFIG = ("preset", "protocol", "data", "seq_len", "dtype", "engine")
_MEASURED = ("perplexity", "perplexity_interval", "windows", "tokens_scored", "simulated")
_PARTS = ("prefill", "decode")
_COUNTED = ("layer_tokens", "kv_written", "halted", "fused", "bits_2", "bits_4", "bits_8")


@contextmanager
def _refusing(path: Path, what: str) -> Iterator[None]:
    """Say that a file is not what it should be, wherever reading it fails."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} is not {what}: {reason}.") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not an object in JSON.")
    return content


def read_results(path: Path) -> dict[str, Any]:
    """A results file of `python -m qs_jax evaluate`.

    Returns:
      Savings and perplexity as they are in the file, its counts layer by layer, the fitted decay,
      and FLOPs by component, of the dense model too.

    Raises:
      InputError: It is no such file.
    """
    content = _json(path)
    with _refusing(path, "a results file of `python -m qs_jax evaluate`"):
        config, counts = content["config"], content["counts"]
        model = ModelConfig.from_dict(content["model"]["config"])
        # Under "continuation" the mechanisms act on the prompt.
        parts = _PARTS[:1] if config["protocol"] == "continuation" else _PARTS
        each = [counts[name]["per_layer"] for name in parts]
        layers = {
            name: [sum(values) for values in zip(*(part[name] for part in each), strict=True)]
            for name in _COUNTED
        }
        return {
            "file": path.name,
            **{name: config[name] for name in _CONFIG},
            **{name: content[name] for name in (*_MEASURED, *SAVED)},
            "window_nll": content["per_window"]["nll"],
            "tokens": sum(counts[name]["tokens"] for name in parts),
            "per_layer": layers,
            "decay": dataclasses.asdict(fit_decay(layers["layer_tokens"])),
            "costs": {k: v for k, v in counted_costs(counts, model).items() if v},
            "dense_flops": float(sum(counts[name]["exact_flops_dense"] for name in _PARTS)),
        }


def read_front(path: Path) -> dict[str, Any]:
    """The candidates of a `FILE.search.json` of `python -m qs_jax calibrate`.

    Returns:
      "points", "front" and "verified" with "saving" and "ppl_increase" each; "objective" and
      "budget".

    Raises:
      InputError: It is no such file.
    """
    content = _json(path)
    with _refusing(path, "a search of `python -m qs_jax calibrate` (FILE.search.json)"):
        provenance = content["preset"]["provenance"]
        saved = f"{provenance['objective']}_saved"
        fields = ("family", "saving", "ppl_increase")
        verified = [
            {name: ({"saving": point[saved]} | point)[name] for name in (*fields, "upper_bound")}
            for point in content["verified"]
            if point.get(saved) is not None
        ]
        return {
            "file": path.name,
            "points": [{name: point[name] for name in fields} for point in content["points"]],
            "front": [{name: point[name] for name in fields} for point in content["front"]],
            "verified": verified,
            "objective": provenance["objective"],
            "budget": provenance["max_ppl_increase"],
            "data": provenance["calibrated_on"],
            "protocol": provenance["protocol"],
        }
