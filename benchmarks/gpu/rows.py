"""The rows of a run: measured while there is time, written one after the other, and shown."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from tqdm import tqdm

from benchmarks import environment, timing
from benchmarks.tables import markdown, origin, percent
from benchmarks.trace import table as table_of_scopes
from qs_jax.errors import QuickSilverError
from qs_jax.jax_settings import explain

NO_TIME = "not run: no time left"
NOT_MEASURED = "not measured"
_LONGEST_REASON, _SHOWN = 300, 60  # characters, in the file and in a table
# Of the packages that bring CUDA to JAX.
_CUDA_PACKAGES = ("jax-cuda", "nvidia-")
Entry = dict[str, Any]


class Run:
    """A file of rows by section, under a limit of time.

    A row is measured if the time left is at least what the longest row so far took. A row that
    fails, or is not run, holds the reason.
    """

    def __init__(self, out: Path, seconds: float, about: Entry) -> None:
        self._out, self._ends = out, time.perf_counter() + seconds
        self._longest = 0.0
        self._bar = tqdm(desc="rows", unit=" rows")
        self.content: Entry = {"about": about, "device": describe_device(), "sections": {}}
        self.save()

    @property
    def seconds_left(self) -> float:
        """Until the limit."""
        return self._ends - time.perf_counter()

    def attempt(self, measure: Callable[[], Entry]) -> Entry:
        """What `measure` returns, or the reason why there is nothing."""
        if self.seconds_left <= self._longest:
            return {"reason": NO_TIME}
        began, entry = time.perf_counter(), {}
        try:
            entry = measure()
            json.dumps(entry, allow_nan=False)  # a number that JSON cannot hold is a failure, too
        except Exception as error:  # one row must not end the others
            entry = {"reason": reason_of(error)}
        if "reason" in entry:
            gc.collect()  # the frames of the error held arrays
        took = time.perf_counter() - began
        self._longest = max(self._longest, took)
        return entry | {"row_seconds": took}

    def note(self, section: str, name: str, entry: Entry) -> bool:
        """Add to a row, and write the file; returns whether the row has no reason to be left."""
        rows = self.content["sections"].setdefault(section, {})
        rows[name] = rows.get(name, {}) | entry
        self._bar.set_description(f"{section}, {name}")
        self._bar.update()
        self.save()
        return "reason" not in rows[name]

    def row(self, section: str, name: str, measure: Callable[[], Entry], **facts: Any) -> bool:
        """Measure one row; `facts` are in it whatever comes of it."""
        return self.note(section, name, facts | self.attempt(measure))

    def save(self) -> None:
        """Write the whole file."""
        environment.write("gpu", self.content, self._out)

    def close(self) -> None:
        """End the progress bar, and say in the file that the run came to its end."""
        self._bar.close()
        self.content["finished"] = True
        self.save()


def reason_of(error: Exception) -> str:
    """One line about an error, shortened."""
    first = next(iter(str(error).splitlines()), "")
    told = first if isinstance(error, QuickSilverError) else explain(error)
    return (told or f"{type(error).__name__}: {first}")[:_LONGEST_REASON]


def describe_device() -> Entry:
    """The device that programs run on, what drives it, and the packages that bring CUDA."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}  # a CPU has none
    names = [dist.metadata["Name"] or "" for dist in importlib.metadata.distributions()]
    cuda = sorted(name for name in names if name.startswith(_CUDA_PACKAGES))
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "devices": len(jax.devices()),
        "compute_capability": str(getattr(device, "compute_capability", "")) or None,
        "memory_bytes": stats.get("bytes_limit"),
        "platform_version": str(getattr(device.client, "platform_version", "")) or None,
        "cuda_packages": {name: importlib.metadata.version(name) for name in cuda},
    }


# --- tables -------------------------------------------------------------------------------------


def tables(content: Mapping[str, Any] | None) -> dict[str, str]:
    """The tables of the README by their names, of a result file or of none."""
    sections = {} if content is None else content["sections"]
    lines = {
        "parity": _parity_line,
        "embedded": _times_line,
        "llama-7b": _times_line,
        "torch": _torch_line,
    }
    shown = {name: _table(sections.get(name), line) for name, line in lines.items()}
    shown["attention"] = _attention(sections.get("attention", {}))
    shown["scopes"] = _scopes(sections.get("trace", {}))
    shown["origin"] = NOT_MEASURED if content is None else _origin(content)
    return {f"gpu {name}": table for name, table in shown.items()}


def _table(rows: Mapping[str, Entry] | None, line: Callable[[str, Entry], Entry]) -> str:
    if not rows:
        return NOT_MEASURED
    found = [line(name, row) for name, row in rows.items()]
    why = [_short(row["reason"]) if "reason" in row else "" for row in rows.values()]
    if any(why):
        found = [cells | {"reason": text} for cells, text in zip(found, why, strict=True)]
    return markdown(pd.DataFrame(found).fillna(""))


def _short(reason: str) -> str:
    text = reason.replace("|", "/")
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _number(row: Mapping[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    value = row.get(name)
    return "" if value is None else format(scale * value, form)


def _over(row: Mapping[str, Any], time: str, baseline: str = "dense") -> str:
    """Time over that of the baseline, with the interval where there is one."""
    runs = row.get("runs", {})
    if row.get("baseline") != baseline or time not in runs:
        return ""
    if f"baseline_{time}" not in runs:  # the baseline itself
        return "1.00"
    found = timing.interval(row, time)
    around = "" if found is None else f" ({found[0]:.2f} to {found[1]:.2f})"
    return f"{timing.ratio(row, time):.2f}{around}"


def _parity_line(name: str, row: Entry) -> Entry:
    return {
        "logits of": name,
        "largest difference": _number(row, "max_difference", ".2g"),
        "mean KL, nats": _number(row, "mean_kl", ".1e"),
        "same likeliest token": percent(row.get("same_likeliest_token")),
        "equal decisions": percent(row.get("equal_decisions")),
    }


def _times_line(name: str, row: Entry) -> Entry:
    memory = row.get("memory", {})
    return {
        "prompt and call": name,
        "mechanism": (row.get("mechanism") or {}).get("kind", ""),
        "prefill, ms": _number(row, "prefill_seconds", ",.1f", 1e3),
        "/ dense (95 %)": _over(row, "prefill_seconds"),
        "FLOPs saved": percent(row.get("prompt_flops_saved")),
        "decode, ms a step of all rows": _number(row, "seconds", ",.2f", 1e3),
        "decode / dense (95 %)": _over(row, "seconds"),
        "tokens a pass": _number(row, "tokens_per_pass", ".2f"),
        "memory, GB": _number(memory, "peak_bytes", ".1f", 1e-9),
        "compile, s": _number(row, "compile_seconds", ".0f"),
    }


def _torch_line(name: str, row: Entry) -> Entry:
    return {
        "prompt and call": name,
        "ms": _number(row, "seconds", ",.1f", 1e3),
        "/ dense (95 %)": _over(row, "seconds"),
    }


def _attention(rows: Mapping[str, Entry]) -> str:
    """A line of each shape, a column of each implementation."""
    lines: dict[str, Entry] = {}
    for name, row in rows.items():
        shape, _, implementation = name.rpartition(" ")
        time = _number(row, "seconds", ",.2f", 1e3) or _short(row.get("reason", ""))
        cells = {f"{implementation}, ms": time}
        if "max_difference" in row:
            cells[f"{implementation}, difference"] = _number(row, "max_difference", ".1g")
        lines[shape] = lines.get(shape, {"shape": shape}) | cells
    return markdown(pd.DataFrame(lines.values()).fillna("")) if lines else NOT_MEASURED


def _scopes(rows: Mapping[str, Entry]) -> str:
    """Milliseconds and shares by scope of the traced call."""
    columns = {name: row["seconds_by_scope"] for name, row in rows.items() if "reason" not in row}
    return table_of_scopes(columns) if columns else next(map(_why, rows.values()), NOT_MEASURED)


def _why(row: Entry) -> str:
    return f"{NOT_MEASURED}: {_short(row['reason'])}"


def _origin(content: Mapping[str, Any]) -> str:
    device, about = content["device"], content["about"]
    facts = [device["kind"], about["model"], f"{about['rounds']} rounds"]
    return origin({"environment": content["environment"]}, *facts)
