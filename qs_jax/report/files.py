"""Reads what other commands wrote: results of `evaluate`, searches of `calibrate`, ablations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from qs_jax.config import ModelConfig
from qs_jax.errors import InputError
from qs_jax.report.measures import counted_costs, fit_decay

_ROW = ("name", "mechanisms", "kind", "ppl", "ppl_increase", "exact_flops_saved")
_OPTIONAL = ("paper_flops_saved", "kv_bytes_saved", "seconds", "time_saved")


def read_results(path: Path) -> dict[str, Any]:
    """A results file of `python -m qs_jax evaluate`.

    Returns:
      Savings and perplexity as they are in the file, its counts layer by layer, the fitted decay,
      and FLOPs by component, of the dense model too.

    Raises:
      InputError: It is no such file.
    """
    content = _json(path)
    try:
        config, counts = content["config"], content["counts"]
        model = ModelConfig.from_dict(content["model"]["config"])
        # Under "continuation" the mechanisms act on the prompt.
        part = "prefill" if config["protocol"] == "continuation" else None
        layers = _per_layer(counts, part)
        names = ("layer_tokens_saved", "exact_flops_saved", "paper_flops_saved", "kv_bytes_saved")
        return {
            "file": path.name,
            "preset": config["preset"],
            "protocol": config["protocol"],
            "data": config["data"],
            "seq_len": config["seq_len"],
            "dtype": config["dtype"],
            "engine": config["engine"],
            "perplexity": content["perplexity"],
            "perplexity_interval": content["perplexity_interval"],
            "windows": content["windows"],
            "tokens_scored": content["tokens_scored"],
            "simulated": content["simulated"],
            "note": content["note"],
            **{name: content[name] for name in names},
            "window_nll": content["per_window"]["nll"],
            "tokens": sum(counts[name]["tokens"] for name in ([part] if part else _PARTS)),
            "per_layer": layers,
            "decay": dataclasses.asdict(fit_decay(layers["layer_tokens"])),
            "costs": {k: v for k, v in counted_costs(counts, model).items() if v},
            "dense_flops": float(sum(counts[name]["exact_flops_dense"] for name in _PARTS)),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not a results file of `python -m qs_jax evaluate`: {_told(error)}."
        ) from error


_PARTS = ("prefill", "decode")
_COUNTED = ("layer_tokens", "kv_written", "halted", "fused", "bits_2", "bits_4", "bits_8")


def _per_layer(counts: dict[str, Any], part: str | None) -> dict[str, list[int]]:
    parts = [counts[name]["per_layer"] for name in ([part] if part else _PARTS)]
    return {
        name: [sum(values) for values in zip(*(each[name] for each in parts), strict=True)]
        for name in _COUNTED
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
    try:
        told = content["preset"]["provenance"]
        objective = told["objective"]
        fields = ("family", "saving", "ppl_increase")
        points = {
            name: [{field: point[field] for field in fields} for point in content[name]]
            for name in ("points", "front")
        }
        verified = [
            {
                "family": point["family"],
                "saving": point[f"{objective}_saved"],
                "ppl_increase": point["ppl_increase"],
                "upper_bound": point["upper_bound"],
            }
            for point in content["verified"]
            if point.get(f"{objective}_saved") is not None
        ]
        return points | {
            "file": path.name,
            "verified": verified,
            "objective": objective,
            "budget": told["max_ppl_increase"],
            "data": told["calibrated_on"],
            "protocol": told["protocol"],
        }
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a search of `python -m qs_jax calibrate` (FILE.search.json): "
            f"{_told(error)}."
        ) from error


def read_ablation(path: Path) -> dict[str, Any]:
    """Isolated and cumulative rows of `python -m benchmarks.ablation`.

    Returns:
      "groups": rows of the same settings, data and protocol together, in the order of the file.

    Raises:
      InputError: It is no such file, or has no such rows.
    """
    content = _json(path)
    groups: dict[str, list[dict[str, Any]]] = {}
    try:
        for row in content["rows"]:
            if row["kind"] not in ("isolated", "cumulative"):
                continue
            named = [row[name] for name in ("settings", "data", "protocol") if row.get(name)]
            kept: dict[str, Any] = {name: row[name] for name in ("kind", *_ROW)}
            kept |= {name: row.get(name) for name in _OPTIONAL}
            groups.setdefault(" · ".join(map(str, named)) or "all", []).append(kept)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a result of `python -m benchmarks.ablation`: {_told(error)}."
        ) from error
    if not groups:
        raise InputError(f"{path} has no row of kind isolated or cumulative.")
    return {
        "file": path.name,
        "groups": [{"name": name, "rows": rows} for name, rows in groups.items()],
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not an object in JSON.")
    return content


def _told(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)
