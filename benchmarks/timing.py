"""Timing calls in turn, ratios of what was timed, and the programs inside a public call.

A ratio of a row is the median over rounds of its time over the mean of the baseline's runs before
and after it: what slows the machine down for a while slows both.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import jax
from scipy.stats import binom
from tqdm import tqdm

_JITTED = type(jax.jit(lambda: None))
_ENGINES = "qs_jax.engine"
Measure = Callable[[], dict[str, float]]


def run_in_turn(
    measures: Mapping[str, Measure],
    rounds: int,
    *,
    baseline: str = "dense",
    sharing: int = 2,
    least: int = 3,
    seconds: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure every row once a round, between two runs of the baseline: A x y A z w A.

    Every other round runs in reverse, so that drift hits all alike. No round is made that would end
    after so many seconds, by the mean of those made, but the `least` are.

    Args:
      measures: By name; each returns named numbers of one run.
      rounds: Runs of each row.
      baseline: Name of the row that the others are compared with.
      sharing: Rows between two runs of the baseline.
      least: Rounds that are made whatever they take.
      seconds: Limit of all rounds; None is no limit.

    Returns:
      By name the median of each number, and all of them under "runs"; of a row also the mean of the
      baseline's runs around it, under the same names with "baseline_".
    """
    others = [name for name in measures if name != baseline]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
    began = time.perf_counter()
    for index in tqdm(range(rounds), "rounds", leave=False):
        spent = time.perf_counter() - began
        if seconds is not None and index >= least and spent * (1 + 1 / index) > seconds:
            break
        runs[baseline].append(measures[baseline]())
        order = others if index % 2 == 0 else others[::-1]
        for at in range(0, len(order), sharing):
            between = {name: measures[name]() for name in order[at : at + sharing]}
            before, after = runs[baseline][-1], measures[baseline]()
            around = {f"baseline_{key}": (before[key] + after[key]) / 2 for key in before}
            for name, run in between.items():
                runs[name].append(run | around)
            runs[baseline].append(after)
    return {name: _summarize(found) for name, found in runs.items()}


def _summarize(runs: list[dict[str, float]]) -> dict[str, Any]:
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    return {name: median(values) for name, values in columns.items()} | {"runs": columns}


def ratios(row: Mapping[str, Any], time: str = "seconds") -> list[float]:
    """A row's time over its baseline's around it, by round; 1 of the baseline itself."""
    own = row["runs"][time]
    return [a / b for a, b in zip(own, row["runs"].get(f"baseline_{time}", own), strict=True)]


def ratio(row: Mapping[str, Any], time: str = "seconds") -> float:
    """Median of `ratios`."""
    return median(ratios(row, time))


def interval(row: Mapping[str, Any], time: str = "seconds") -> tuple[float, float] | None:
    """Where the median of `ratios` lies with 95 % confidence; None of fewer than six runs.

    Of n ordered ratios the k-th from either end: fewer than k of n lie on one side of the true
    median with a probability of P(Binomial(n, 1/2) < k), at most 0.025.
    """
    ordered = sorted(ratios(row, time))
    k = int(binom.ppf(0.025, len(ordered), 0.5))
    return (ordered[k - 1], ordered[-k]) if k else None


class Watch:
    """What ran inside a `watch` block.

    `spent` holds the seconds in programs, each waited for, by the name of the function. Each of
    `programs` returns an executable, which comes from JAX's cache, in the order of first calls.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.programs: list[Callable[[], Any]] = []
        self._seen: set[int] = set()
        self._inside = False

    @property
    def seconds(self) -> float:
        """Spent in all programs."""
        return sum(self.spent.values())

    def wrap(self, function: Any) -> Callable[..., Any]:
        """A stand-in for a jitted function that is timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # traced as part of another program
                return function(*args, **kwargs)
            if id(function) not in self._seen:
                self._seen.add(id(function))
                # Shapes only: arrays may be donated.
                given, named = jax.tree.map(_shape_of, (args, kwargs))
                self.programs.append(lambda: function.lower(*given, **named).compile())
            self._inside, began = True, time.perf_counter()
            try:
                return jax.block_until_ready(function(*args, **kwargs))
            finally:
                name, seconds = function.__name__, time.perf_counter() - began
                self.spent[name] = self.spent.get(name, 0.0) + seconds
                self._inside = False

        return timed

    def memory(self) -> dict[str, int]:
        """Bytes of the largest program, by the compiler; empty where the backend does not tell."""
        sizes = []
        for program in self.programs:
            if (stats := program().memory_analysis()) is not None:
                size = {"argument_bytes": int(stats.argument_size_in_bytes)}
                size["temp_bytes"] = int(stats.temp_size_in_bytes)
                results = int(stats.output_size_in_bytes - stats.alias_size_in_bytes)
                sizes.append(size | {"peak_bytes": sum(size.values()) + results})
        return max(sizes, key=lambda size: size["peak_bytes"], default={})


def _shape_of(leaf: Any) -> Any:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return leaf
    weak = getattr(leaf, "weak_type", False)
    # Where it is committed to a device: otherwise JAX takes it for another program.
    sharding = leaf.sharding if getattr(leaf, "committed", False) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak, sharding=sharding)


@contextmanager
def watch() -> Iterator[Watch]:
    """Time every jitted function that modules of the engines hold by name."""
    seen, stand_ins = Watch(), {}
    holders = [
        (module, name, value)
        for module_name, module in list(sys.modules.items())
        if module_name == _ENGINES or module_name.startswith(_ENGINES + ".")
        for name, value in list(vars(module).items())
        if isinstance(value, _JITTED)
    ]
    try:
        for module, name, value in holders:
            # One stand-in a function: modules compare programs with `is`.
            setattr(module, name, stand_ins.setdefault(id(value), seen.wrap(value)))
        yield seen
    finally:
        for module, name, value in holders:
            setattr(module, name, value)
