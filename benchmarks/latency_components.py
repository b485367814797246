"""Calls of `benchmarks.latency` whose time is split by scopes."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np

import qs_jax
from benchmarks import components, latency_cases
from qs_jax.config import Config, ModelConfig
from qs_jax.models import Params

# Profiles of each call, in turn; medians are taken. A quick run makes one.
PROFILES = 3


def deciding(
    params: Params,
    model: ModelConfig,
    rows_NT: np.ndarray,
    presets: tuple[str, ...],
    profiles: int,
) -> dict[str, dict[str, float]]:
    """Components of prefills in which a preset decides about every token and stops none.

    Args:
      params: Of the model.
      model: Architecture.
      rows_NT: Prompts.
      presets: Names.
      profiles: Of each.

    Returns:
      Seconds by component, by preset, and of "dense".
    """
    cases = latency_cases.prefill_cases(model, presets, rows_NT.shape[1])
    cfgs = {case.name: case.cfg for case in cases}
    wanted = {"dense": cfgs["dense"]}
    wanted |= {name: cfgs[f"{name}, decisions only"] for name in presets}
    return _in_turn(params, rows_NT, wanted, profiles)


def components_of_calls(
    params: Params,
    model: ModelConfig,
    rows_NT: np.ndarray,
    presets: tuple[str, ...],
    profiles: int,
) -> dict[str, dict[str, float]]:
    """Components of a dense prefill and decode and of each preset's prefill; as `deciding`."""
    one: dict[str, Any] = {"max_new_tokens": 1, "eos_token_ids": ()}
    cfgs = {"dense prefill": Config(model, **one)}
    for name in presets:
        cfgs[f"{name}, prefill"] = Config(model, qs_jax.presets.by_name(name, model), **one)
    cfgs["dense decode, with its prefill"] = cfgs["dense prefill"].replace(max_new_tokens=64)
    return _in_turn(params, rows_NT, cfgs, profiles)


def _in_turn(
    params: Params, rows_NT: np.ndarray, cfgs: dict[str, Config], profiles: int
) -> dict[str, dict[str, float]]:
    """Median components of calls that are profiled one after the other, so many times."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cfgs}
    for _ in range(profiles):
        for name, cfg in cfgs.items():
            found = components.profile(lambda cfg=cfg: qs_jax.generate(params, rows_NT, cfg))
            runs[name].append(found)
    return {name: _medians(found) for name, found in runs.items()}


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    parts = dict.fromkeys(part for run in runs for part in run)
    return {part: median(run.get(part, 0.0) for run in runs) for part in parts}
