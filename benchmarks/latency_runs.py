"""Warm-up, interleaved runs and medians of one group of calls."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from statistics import median
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

import qs_jax
from benchmarks.latency_cases import Case, Group
from benchmarks.programs import watch
from qs_jax import accounting
from qs_jax.engine import weights
from qs_jax.errors import QuickSilverError
from qs_jax.mechanisms.kv_maps import sizes_of
from qs_jax.models import Params
from qs_jax.record import Record
from qs_jax.timing import Stopwatch

# The program of a decode that ends with each row's first token.
PREFILL = "start"


class Runner(Protocol):
    """A call that can be timed again and again."""

    def warm(self) -> dict[str, Any]:
        """Run it once; what there is to say about it besides its time."""
        ...

    def run(self) -> dict[str, float]:
        """Run it once; named times in seconds, "seconds" among them."""
        ...


class OurRunner:
    """A public call of ours.

    Times: "seconds" in its programs, "call_seconds" for all of it (checks, padding, record). A
    decode is what follows the prefill's program, over N - 1 tokens; where one program makes all
    tokens, the call less a call with one new token. "prefill_seconds" is what was taken off.
    """

    def __init__(self, params: Params, rows_NT: np.ndarray, section: str, case: Case) -> None:
        self._params, self._rows, self._case, self._section = params, rows_NT, case, section

    def _call(self, cfg: qs_jax.Config) -> Any:
        call = qs_jax.score if self._section == "scoring" else qs_jax.generate
        return call(self._params, self._rows, cfg)

    @property
    def _short(self) -> qs_jax.Config:
        return self._case.cfg.replace(max_new_tokens=1)

    def warm(self) -> dict[str, Any]:
        with watch() as seen, Stopwatch() as stopwatch:
            out = self._call(self._case.cfg)
        told = {"compile_seconds": stopwatch.compile, "memory": seen.memory()}
        told["dtype"] = self._case.cfg.model.dtype
        if self._section == "decode" and PREFILL not in seen.spent:
            self._call(self._short)
        kv_bytes = getattr(out, "kv_bytes", None)
        if kv_bytes is not None:
            told["kv_bytes"] = int(kv_bytes)
        return told | self._work(out)

    def _work(self, out: Any) -> dict[str, Any]:
        """Exact FLOPs of the timed part of a call, and shares saved, from its record.

        Of a decode that is the new tokens; its "prefill" holds the same of the prompt.
        """
        dense = out.record is None
        record = self._dense_record() if dense else out.record
        qs = None if dense else self._case.cfg.quicksilver
        counted = accounting.tally(record, self._case.cfg.model, qs, sizes_of(self._params))

        def flops(*parts: str) -> dict[str, Any]:
            whole, ours = (
                sum(counted[part][key] for part in parts)
                for key in ("exact_flops_dense", "exact_flops")
            )
            return {
                "exact_flops_dense": whole,
                "exact_flops": ours,
                "exact_flops_saved": 1 - ours / whole,
                "simulated": None if dense else record.simulated,
            }

        timed = ("prefill", "decode") if self._section == "scoring" else (self._section,)
        shares = {
            "layer_tokens_saved": record.layer_tokens_saved,
            "kv_skip_rate": skip_rate(record),
        }
        prefill = {"prefill": flops("prefill")} if self._section == "decode" else {}
        return flops(*timed) | shares | prefill

    def _dense_record(self) -> Record:
        rows, width = self._rows.shape
        lengths = np.full(rows, width, np.int32)
        prompts = lengths if self._section != "scoring" else np.zeros_like(lengths)
        cfg = self._case.cfg
        if self._section == "scoring" and cfg.effective_protocol == "continuation":
            prompts = lengths - cfg.continuation_tokens
        if self._section == "decode":
            lengths = lengths + cfg.max_new_tokens - 1
        return accounting.dense_record(lengths, prompts, cfg.model)

    def run(self) -> dict[str, float]:
        decodes = self._section == "decode"
        if decodes:  # kept of the parameters used last, which may be those of another dtype's row
            weights.as_decoded(self._params, self._case.cfg.decode_weights, len(self._rows))
        times, spent = self._timed(self._case.cfg)
        if not decodes:
            return times
        if PREFILL in spent:
            before = dict.fromkeys(times, spent[PREFILL])
        else:
            before, _ = self._timed(self._short)
        steps = self._case.cfg.max_new_tokens - 1
        per_token = {name: (times[name] - before[name]) / steps for name in times}
        return per_token | {"prefill_seconds": before["seconds"]}

    def _timed(self, cfg: qs_jax.Config) -> tuple[dict[str, float], dict[str, float]]:
        with watch() as seen:
            began = time.perf_counter()
            self._call(cfg)
            call_seconds = time.perf_counter() - began
        return {"seconds": seen.seconds, "call_seconds": call_seconds}, seen.spent


def skip_rate(record: Record) -> float:
    """Share of (layer, token) keys and values that are not held at the end."""
    return 1 - float(record.kv_held.sum()) / (len(record.kv_held) * float(record.lengths.sum()))


def interleave(
    runners: Mapping[str, Runner],
    rounds: int,
    baselines: Mapping[str, str] = MappingProxyType({}),
    least: int = 3,
    seconds: float | None = None,
    label: str = "",
    sharing: int = 2,
) -> dict[str, list[dict[str, float]]]:
    """Run every runner once a round, between two runs of its baseline.

    A few runners share those: A x y A z w A. The order turns round every round, so that drift hits
    all alike.

    Args:
      runners: By name.
      rounds: Runs of each; of a baseline one more than it has pairs, every round.
      baselines: What a runner is compared with, by name.
      least: Rounds that are made whatever they take.
      seconds: Make no further round that would end later, going by the one before; None is no
        limit.
      label: For the progress bar.
      sharing: Runners between two runs of their baseline.

    Returns:
      Times of each run; the mean of both runs of the baseline around it under the same names with
      "baseline_".
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runners}

    def run(name: str) -> dict[str, float]:
        found[name].append(runners[name].run())
        return found[name][-1]

    def one_round(names: list[str], base: str | None) -> None:
        before = run(base) if base is not None else {}
        for at in range(0, len(names), sharing):
            between = names[at : at + sharing]
            for name in between:
                run(name)
            after = run(base) if base is not None else {}
            around = {f"baseline_{key}": (before[key] + after[key]) / 2 for key in before}
            for name in between:
                found[name][-1] |= around
            before = after

    names = list(runners)
    bases = [base for base in dict.fromkeys(baselines.values()) if base in runners]
    compared = {base: [n for n in names if baselines.get(n) == base != n] for base in bases}
    alone = [name for name in names if name not in {*bases, *itertools.chain(*compared.values())}]
    began = before = time.perf_counter()
    for index in tqdm(range(rounds), label, leave=False):
        now = time.perf_counter()
        if seconds is not None and index >= least and 2 * now - before - began > seconds:
            break
        before = now
        for base, others in [*compared.items(), (None, alone)]:
            one_round(others if index % 2 == 0 else others[::-1], base)
    return found


def summarise(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and every run of "seconds"."""
    times: dict[str, Any] = {name: median(run[name] for run in runs) for name in runs[0]}
    return times | {"runs": {name: [run[name] for run in runs] for name in runs[0]}}


def measure(
    group: Group,
    params: Params,
    rows_NT: np.ndarray,
    rounds: int,
    extra: Callable[[], dict[str, Runner]] = dict,
    least: int = 3,
    seconds: Callable[[], float | None] = lambda: None,
) -> dict[str, Any]:
    """Warm every case of a group up, then time them in turn.

    Args:
      group: What to run.
      params: Parameters of the model.
      rows_NT: Token ids, `[batch, length]`.
      rounds: Runs of each case.
      extra: Makes runners to be timed with them.
      least: As `interleave`.
      seconds: As `interleave`, asked after the warm-up.

    Returns:
      {"rows": {name: row}}; a row that cannot run has "not_measured": the reason.
    """
    runners: dict[str, Runner] = {
        case.name: OurRunner(params, rows_NT, group.section, case) for case in group.cases
    }
    baselines = {case.name: case.baseline for case in group.cases}
    runners |= extra()
    rows: dict[str, Any] = {}
    for name, runner in tqdm(list(runners.items()), f"{group.key}, warm-up", leave=False):
        try:
            rows[name] = runner.warm()
        except (QuickSilverError, NotImplementedError) as error:
            rows[name] = {"not_measured": str(error)}
            del runners[name]
    beside = {name: baselines.get(name, "dense") for name in runners}
    sharing = 4 if group.long else 2
    timed = interleave(runners, rounds, beside, least, seconds(), group.key, sharing)
    for name, runs in timed.items():
        rows[name] |= summarise(runs) | {"baseline": baselines.get(name, "dense")}
    return {"rows": rows, "batch": group.batch, "length": group.length, "section": group.section}


def prefill_of(found: dict[str, Any]) -> dict[str, Any]:
    """The prefills inside a decode's calls as a group of their own.

    Args:
      found: A decode's group, from `measure`.

    Returns:
      The same of section "prefill": of each row its prefills' times and FLOPs.
    """
    rows = {}
    for name, row in found["rows"].items():
        if "runs" not in row:
            rows[name] = row
        elif "prefill_seconds" in row["runs"]:  # not of a row that only reads memory
            runs = {
                f"{before}{time}": row["runs"][f"{before}prefill_seconds"]
                for before in ("", "baseline_")
                for time in ("seconds", "call_seconds")
                if f"{before}prefill_seconds" in row["runs"]
            }
            times = {key: median(values) for key, values in runs.items()}
            kept = {key: row[key] for key in ("baseline", "dtype", "memory") if key in row}
            rows[name] = kept | row.get("prefill", {}) | times | {"runs": runs}
    return found | {"rows": rows, "section": "prefill"}
