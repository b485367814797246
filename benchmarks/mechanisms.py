"""What each mechanism does to perplexity and to the counted work, on a real model and text.

`python -m benchmarks.mechanisms --ckpt DIR --data FILE` scores the first windows of a text under
every row and writes benchmarks/results/mechanisms.json after each (a stopped run goes on where it
was). The pages of docs/mechanisms show some of them. Maps and percentiles are fitted on the windows
that follow the scored ones. All savings are simulated: counted from masks.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

import qs_jax
from benchmarks import environment, mechanism_rows
from benchmarks.mechanism_rows import CONTINUATION, TEACHER, Row
from benchmarks.tables import markdown, percent
from qs_jax import accounting
from qs_jax.calibration.fit_maps import fit_kv_maps
from qs_jax.config import Config, ModelConfig
from qs_jax.errors import InputError, exit_code
from qs_jax.evaluation import perplexity
from qs_jax.mechanisms.kv_maps import select
from qs_jax.models import Params

# The rows that a page shows: what its table calls them, and their keys without the protocol.
SHOWN: dict[str, dict[str, str]] = {
    "halting": {
        "`dual`: drift and entropy are low": "ablation, percentiles | H",
        "`quota`: least attended first": "scores | 50% at layer 20, lowest attention first",
        "`quota`: random": "scores | 50% at layer 20, lowest random first",
        "`quota`: lowest drift first": "scores | 50% at layer 20, lowest drift first",
        "`quota`: highest key norm first": "scores | 50% at layer 20, highest key norm first",
    },
    "kv skipping": {
        f"layer {layer}: `{policy}`": f"policies | 50% at layer {layer} | {policy}"
        for layer in (24, 20)
        for policy in ("skip", "attended", "propagate", "extrapolate")
    },
    "fusion": {
        "fusion": "ablation, percentiles | F",
        "halting, skipping": "ablation, percentiles | H+K",
        "halting, skipping, fusion": "ablation, percentiles | H+K+F",
        "half stops at 20: `skip`": "policies | 50% at layer 20 | skip",
        "half stops at 20: `extrapolate`": "policies | 50% at layer 20 | extrapolate",
    },
    "quantization": {
        "8 bits": "bits | 8 bits",
        "4 bits": "bits | 4 bits",
        "2 bits": "bits | 2 bits",
        "adaptive: 8, 4, 2": "bits | adaptive, nats (1.0, 2.3)",
        "8 bits, int8 products": "bits | 8 bits, int8 products",
        "8 bits, int8 keys and values": "bits | 8 bits, int8 keys and values",
    },
}


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
    """Measure every row."""

    out: Path = environment.RESULTS / "mechanisms.json"
    """JSON file."""
    sections: tuple[str, ...] = ()
    """Measure the rows of these sections only; all by default."""


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
    given = {"data": about["text"], "progress": True}
    maps = fit_kv_maps(params, fitting_WT, mechanism_rows.MAP_LAYERS, model, **given)

    def params_for(row: Row) -> Params:
        skip, halting = row.quicksilver.kv_skip, row.quicksilver.halting
        if skip is None or skip.policy != "extrapolate":
            return params
        if row.section == "presets":
            cfg = Config(model, row.quicksilver, protocol=row.protocol)
            return environment.attach_maps(params, cfg, args.ckpt, row.name)
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


def changes(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`paired_change` of every row from the dense one, and "saved": shares of what may be saved.

    Teacher-forced, all work may be saved; under continuation, that of the prompt.
    """
    rows = content["rows"]
    return {
        key: paired_change(row, rows[f"presets | off | {key.rsplit(' | ', 1)[1]}"])
        | {"saved": row["saved"]["prefill"]}
        for key, row in rows.items()
    }


def tables(content: Mapping[str, Any]) -> dict[str, str]:
    """Markdown of the pages' tables, by the names in their markers."""
    changed = changes(content)
    return {name: markdown(_summary(changed, shown)) for name, shown in SHOWN.items()}


def _savings(change: Mapping[str, Any]) -> dict[str, str]:
    names = {"exact FLOPs saved": "exact_flops_saved", "KV bytes saved": "kv_bytes_saved"}
    return {head: percent(change["saved"][name]) for head, name in names.items()}


def _summary(changed: Mapping[str, Any], shown: Mapping[str, str]) -> pd.DataFrame:
    """The change under each protocol that was measured, and what a prompt saves."""
    lines = []
    for label, key in shown.items():
        rows = {name: changed.get(f"{key} | {name}") for name in (TEACHER, CONTINUATION)}
        if prompt := rows[CONTINUATION]:
            line = {f"change, {name}": increase(row) if row else "" for name, row in rows.items()}
            lines.append({"": label} | line | _savings(prompt))
    frame = pd.DataFrame(lines)
    return frame.loc[:, (frame != "").any()]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    environment.run_command("mechanisms", Arguments, measure, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
