"""Measured seconds and allocated bytes of the ablation's rows: prefills by the compact engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import qs_jax
from benchmarks import environment, latency_runs
from benchmarks.ablation_rows import Case as Row
from benchmarks.latency_cases import Case, Group
from qs_jax.config import Config, QuickSilverConfig
from qs_jax.mechanisms.execution import resolve_execution
from qs_jax.models import Params


class Prefill(latency_runs.OurRunner):
    """A prefill; the warm-up generates one more token, for which the cache is packed."""

    def __init__(self, params: Params, rows_NT: np.ndarray, cfg: Config) -> None:
        super().__init__(params, rows_NT, "prefill", Case("", cfg))

    def warm(self) -> dict[str, Any]:
        cfg = self._case.cfg
        told = super().warm()
        out = qs_jax.generate(self._params, self._rows, cfg.replace(max_new_tokens=2))
        ran = resolve_execution(cfg.quicksilver, cfg.model, "decode")
        letters = Row("", "", "", ran).mechanisms if ran is not None else ""
        return told | {"kv_bytes": out.kv_bytes, "mechanisms": letters}


def key(row: Row) -> str:
    """Name of a row among the timed ones; equal rows are timed once."""
    return f"{row.source} | {row.name}"


def measure(
    params: Params,
    rows_NT: np.ndarray,
    cfg: Config,
    runs: Mapping[str, tuple[Params, QuickSilverConfig]],
    *,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Warm all rows up, then time them in turn, each between two runs of the dense model.

    Args:
      params: Of the dense model.
      rows_NT: Prompts, `[N, T]`.
      cfg: The prefill, without mechanisms.
      runs: By name, the parameters (with maps where they are read) and the mechanisms.
      rounds: Timed runs of each.
      seconds: Make no further round that would end later; two are made.

    Returns:
      As `benchmarks.latency_runs.measure`, with "mechanisms" for what really ran: bits run only
      where int8 products are faster.
    """
    runners: dict[str, latency_runs.Runner] = {"dense": Prefill(params, rows_NT, cfg)}
    for name, (own, qs) in runs.items():
        runners[name] = Prefill(own, rows_NT, cfg.replace(quicksilver=qs))
    group = Group("prefill", *rows_NT.shape, cases=())
    found = latency_runs.measure(
        group, params, rows_NT, rounds, lambda: runners, least=2, seconds=lambda: seconds
    )
    return found | {"commit": environment.commit()}
