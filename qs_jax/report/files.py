"""Reads files of other commands: results of `evaluate`, searches of `calibrate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qs_jax.config import ModelConfig
from qs_jax.errors import InputError
from qs_jax.evaluation.perplexity import SAVED
from qs_jax.report.measures import counted_costs, fit_decay

_CONFIG = ("preset", "protocol", "data", "seq_len", "dtype", "engine")
_MEASURED = ("perplexity", "perplexity_interval", "windows", "simulated", *SAVED)
_COUNTED = ("layer_tokens", "kv_written", "halted", "fused", "bits_2", "bits_4", "bits_8")


def read_results(path: Path) -> dict[str, Any]:
    """What a report shows of a results file of `python -m qs_jax evaluate`.

    Raises:
      InputError: It is no such file.
    """
    return _read(path, _results, "a results file of `python -m qs_jax evaluate`")


def read_front(path: Path) -> dict[str, Any]:
    """The candidates and the budget of a `FILE.search.json` of `python -m qs_jax calibrate`.

    Raises:
      InputError: It is no such file.
    """
    return _read(path, _front, "a search of `python -m qs_jax calibrate` (FILE.search.json)")


def _read(path: Path, parse: Callable[[dict[str, Any]], dict[str, Any]], kind: str) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not an object in JSON.")
    try:
        return {"file": path.name} | parse(content)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} is not {kind}: {reason}.") from error


def _results(content: dict[str, Any]) -> dict[str, Any]:
    config, counts = content["config"], content["counts"]
    model = ModelConfig.from_dict(content["model"]["config"])
    both = [counts["prefill"], counts["decode"]]
    # Under "continuation" the mechanisms act on the prompt.
    parts = both[:1] if config["protocol"] == "continuation" else both
    layers = {
        name: [sum(each) for each in zip(*(part["per_layer"][name] for part in parts), strict=True)]
        for name in _COUNTED
    }
    return {
        **{name: config[name] for name in _CONFIG},
        **{name: content[name] for name in _MEASURED},
        "tokens": sum(part["tokens"] for part in parts),
        "per_layer": layers,
        "decay": fit_decay(layers["layer_tokens"]),
        "costs": {name: flops for name, flops in counted_costs(counts, model).items() if flops},
        "dense_flops": float(sum(part["exact_flops_dense"] for part in both)),
    }


def _front(content: dict[str, Any]) -> dict[str, Any]:
    provenance = content["preset"]["provenance"]
    saved = f"{provenance['objective']}_saved"

    def points(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: row[name] for name in ("family", "saving", "ppl_increase")} for row in rows]

    measured = [row for row in content["verified"] if row.get(saved) is not None]
    return {
        "points": points(content["points"]),
        "front": points(content["front"]),
        "verified": points([{"saving": row[saved]} | row for row in measured]),
        "objective": provenance["objective"],
        "budget": provenance["max_ppl_increase"],
    }
