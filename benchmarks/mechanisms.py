"""What each mechanism does to perplexity and to the counted work, on a real model and text.

`python -m benchmarks.mechanisms --ckpt DIR --data FILE` scores the first windows of a text under
every row of the tables in docs/mechanisms.md, writes benchmarks/results/mechanisms.json after each
row (a stopped run goes on where it was), and rewrites the tables. Maps and percentiles are fitted
on the windows that follow the scored ones. All savings are simulated: counted from masks.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

import qs_jax
from benchmarks import environment, mechanism_rows
from benchmarks.mechanism_rows import Row
from benchmarks.tables import markdown, origin, percent, replace_tables
from qs_jax import accounting
from qs_jax.calibration.fit_maps import accumulate
from qs_jax.config import Config, ModelConfig
from qs_jax.errors import InputError, exit_code
from qs_jax.evaluation import perplexity
from qs_jax.mechanisms.kv_maps import FEATURES, select
from qs_jax.models import Params

# Columns of the tables, and their names in the file.
SHARES = {
    "layer-tokens": "layer_tokens_saved",
    "exact FLOPs": "exact_flops_saved",
    "paper FLOPs": "paper_flops_saved",
    "KV held": "kv_bytes_saved",
    "paper FLOPs, 16 bit": "paper_flops_saved_16bit",
}
PAGES = (Path("docs/mechanisms.md"), Path("docs/calibration.md"), Path("README.md"))


@dataclasses.dataclass
class Inputs:
    """A model and windows of a text: some are scored, those after them are fitted on."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    data: str = "wikitext-103"
    """wikitext-103, or a file: field "text" of .jsonl, .jsonl.gz, .json.gz, or plain text."""
    windows: int = 16
    """Windows scored."""
    fit_windows: int = 64
    """Windows after those, for maps and percentiles."""
    seq_len: int = 512
    """Tokens a window."""
    batch_size: int = 4
    """Windows at a time."""

    def read(
        self, dtype: str = "float32"
    ) -> tuple[Params, ModelConfig, np.ndarray, dict[str, Any]]:
        """Parameters, model, all windows, and what the inputs are.

        Raises:
          InputError: The text is too short.
        """
        params, model = qs_jax.load(self.ckpt, dtype=dtype)
        needed, tokenizer = self.windows + self.fit_windows, qs_jax.load_tokenizer(self.ckpt)
        text, windows = perplexity.read_windows(self.data, tokenizer, self.seq_len, needed)
        if windows.tokens_WT.shape != (needed, self.seq_len):
            raise InputError(
                f"{text.name} has {windows.tokens_in_text:,} tokens; {needed} windows of "
                f"{self.seq_len} are needed: lower --windows or --fit-windows, or give more text."
            )
        about = {
            "model": environment.source_of(self.ckpt),
            "text": text.name,
            "dtype": model.dtype,
        }
        names = ("windows", "seq_len", "fit_windows", "batch_size")
        about |= {name: getattr(self, name) for name in names} | {"sha256": text.sha256}
        return params, model, windows.tokens_WT, about


@dataclasses.dataclass
class Arguments(Inputs):
    """Measure every row and rewrite the tables."""

    out: Path = environment.RESULTS / "mechanisms.json"
    """JSON file."""
    sections: tuple[str, ...] = ()
    """Measure the rows of these tables only; all by default."""
    tables_only: bool = False
    """Rewrite the tables from the JSON file, measure nothing."""


def score_rows(
    rows: Sequence[Row],
    measured: dict[str, Any],
    tokens_WT: np.ndarray,
    model: ModelConfig,
    batch_size: int,
    params_for: Callable[[Row], Params],
    save: Callable[[], None],
) -> None:
    """Score what has not been measured yet: each window's loss, and the savings.

    `measured` holds results by the rows' keys: what was measured with the same settings stays.
    `params_for` gives the parameters, with the maps that a row reads; `save` is called after each.
    """

    def settings(quicksilver: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in quicksilver.items() if name != "provenance"}

    for row in tqdm(rows, "rows"):
        here = row.quicksilver.to_dict()
        if settings(measured.get(row.key, {}).get("quicksilver", {})) == settings(here):
            continue
        cfg = Config(model, row.quicksilver, protocol=row.protocol, engine="masked")
        entries = list(
            perplexity.score_windows(params_for(row), tokens_WT, cfg, batch_size=batch_size)
        )
        measured[row.key] = {
            "nll": [value for entry in entries for value in entry["nll"]],
            "tokens": [count for entry in entries for count in entry["tokens"]],
            "saved": accounting.summary(perplexity.total_counts(entries)),
            "quicksilver": here,
            "commit": environment.commit(),
        }
        save()


def measure(args: Arguments) -> None:
    """Score all rows, one after the other, into the JSON file."""
    params, model, windows_WT, about = args.read()
    fitting_WT = windows_WT[args.windows :]
    content = environment.read(args.out, about, {"rows": {}, "about": about})

    def save() -> None:
        environment.write(args.out.stem, content, args.out)

    if "fitted" not in content:
        content["fitted"] = mechanism_rows.percentiles(params, fitting_WT[:4], model)
        save()
    rows = list(mechanism_rows.all_rows(model, content["fitted"]))
    rows = [row for row in rows if not args.sections or row.section in args.sections]
    features = [name for name in FEATURES if any(name in row.features for row in rows)]
    given = {"features": tuple(features), "data": about["text"], "progress": True}
    moments = accumulate(params, fitting_WT, mechanism_rows.MAP_LAYERS, model, **given)

    def params_for(row: Row) -> Params:
        skip, halting = row.quicksilver.kv_skip, row.quicksilver.halting
        if skip is None or skip.policy != "extrapolate":
            return params
        if row.section == "presets":
            cfg = Config(model, row.quicksilver, protocol=row.protocol)
            return environment.attach_maps(params, cfg, args.ckpt, row.name)
        maps = moments.solve(row.features, rank=row.rank)
        assert halting is not None
        return {**params, "kv_maps": select(maps, halting.layers or ())}

    scored_WT = windows_WT[: args.windows]
    score_rows(rows, content["rows"], scored_WT, model, args.batch_size, params_for, save)


def paired_change(row: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Perplexity and its increase, from "nll" and "tokens" of each window.

    The interval is of 95 %, paired by window: the spread between texts drops out. It is None of a
    single window, and numbers beyond the range of float64 are. The dense row may hold more windows.
    """
    count = len(row["nll"])
    ours = np.array(row["nll"]) / np.array(row["tokens"])
    theirs = np.array(dense["nll"][:count]) / np.array(dense["tokens"][:count])
    base, own = (perplexity.exp(float(losses.mean())) for losses in (theirs, ours))
    assert base is not None
    ends = perplexity.interval(ours - theirs)
    return {
        "ppl": own,
        "dense_ppl": base,
        "ppl_increase": None if own is None else own - base,
        "interval": ends and [None if end is None else base * (end - 1) for end in ends],
    }


def increase(change: Mapping[str, Any]) -> str:
    """The increase of `paired_change` and its interval as a cell of a table."""
    value, ends = change["ppl_increase"], change["interval"] or []
    if value is None:
        return "beyond float64"
    if all(end is not None and abs(end) < 0.005 for end in (value, *ends)):
        return "0.00"
    if change["ppl"] > 10 * change["dense_ppl"]:
        return f"{value:+,.0f}"
    known = [end for end in ends if end is not None]
    return f"{value:+.2f}" + (f" ({known[0]:+.2f} to {known[1]:+.2f})" if known else "")


def tables(content: dict[str, Any], calibration: dict[str, Any]) -> dict[str, str]:
    """Markdown of each section, and of the walk of the calibration that `balanced` comes from."""
    rows, fitted, lines = content["rows"], content["fitted"], {}
    for key, row in rows.items():
        section, *name, protocol = key.split(" | ")
        change = paired_change(row, rows[f"presets | off | {protocol}"])
        line = {"": ", ".join(name), "protocol": protocol, "perplexity": f"{change['ppl']:.4g}"}
        line["change, 95 % interval"] = increase(change)
        for name, share in SHARES.items():
            line[name] = percent(row["saved"]["prefill"][share])
        lines.setdefault(section, []).append(line)
    for at, layer in enumerate(fitted["layers"]):
        line = {
            "layer": str(layer),
            "25th percentile of raw drift": f"{fitted['tau_drift'][at]:.3g}",
        }
        line["of lens entropy, nats"] = f"{fitted['tau_halt'][at]:.3g}"
        lines.setdefault("fitted", []).append(line)
    for name, calibrated in calibration["presets"].items():
        lines[f"calibrated {name}"] = [_walk(entry, calibrated) for entry in calibrated["verified"]]
    found = {name: markdown(pd.DataFrame(of_section)) for name, of_section in lines.items()}
    return found | {"about": origin(content)}


def _walk(entry: Mapping[str, Any], calibrated: Mapping[str, Any]) -> dict[str, str]:
    """One verified candidate of light layers as a line of a table."""
    bound, retrieval = entry["upper_bound"], entry.get("retrieval")
    line = {"tokens": f"{entry.get('seq_len', calibrated['seq_len']):,}"}
    *_, price, share = entry["levels"]
    line["price"] = f"{calibrated['prices'][price]:g}"
    line["light"] = percent(calibrated["shares"][share])
    line["exempt at the end"] = str(entry.get("recent_tokens", 32))
    line["perplexity"] = f"{entry['ppl_increase']:+.2f}"
    line["upper bound"] = "none" if bound is None else f"{bound:+.2f}"
    line |= {name: f"{on['ppl_increase']:+.2f}" for name, on in entry.get("texts", {}).items()}
    line |= {"KL, nats": f"{entry['kl']:.4f}", "same next token": percent(entry["agreement"])}
    line["passkeys lost"] = "" if retrieval is None else str(retrieval["lost"])
    line["FLOPs saved"] = percent(entry["prompt_exact_flops_saved"])
    return line | {"kept": "yes" if entry["within_budget"] else "**no**"}


def run(args: Arguments) -> None:
    """Measure, and rewrite the tables."""
    if not args.tables_only:
        measure(args)
    paths = (args.out, environment.RESULTS / "calibration.json")
    made = tables(*(json.loads(path.read_text(encoding="utf-8")) for path in paths))
    for page in PAGES:
        replace_tables(page, made)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    environment.run_command("mechanisms", Arguments, run, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
