"""Each mechanism alone, added up, and along its threshold (paper Tables 3, 10, 11; appendix P).

`python -m benchmarks.ablation --ckpt DIR --data FILE --c4 FILE` scores the first windows of each
text, writes the JSON file after each row (a stopped run goes on where it was), and then times
prefills of the compact engine against the dense model, in turn. Perplexities are real. Counted
savings are simulated: the masked engine computes all and selects; seconds and allocated bytes are
measured. `python -m benchmarks.paper_tables` makes docs/paper-tables.md of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import qs_jax
from benchmarks import ablation_figures, ablation_rows, ablation_timing, environment
from benchmarks.ablation_rows import Case, digest
from benchmarks.ablation_walkthrough import walk
from benchmarks.mechanisms import score_row
from qs_jax.calibration.observe import observe
from qs_jax.checkpoint import read_manifest
from qs_jax.commands.maps import find_maps
from qs_jax.config import Config, ModelConfig, QuickSilverConfig
from qs_jax.errors import InputError, QuickSilverError
from qs_jax.evaluation.journal import write_json
from qs_jax.evaluation.perplexity import Windows, check_width, cut_windows, read_windows
from qs_jax.models import Params

SETTINGS = ("paper", "percentile", "balanced", "aggressive")


@dataclasses.dataclass
class Arguments:
    """Score and time the ablation."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """Folder written by convert.hf_to_flax."""
    data: str = "wikitext-103"
    """wikitext-103, or a file: field "text" of .jsonl, .jsonl.gz, .json.gz, or plain text."""
    c4: str | None = None
    """A sample of C4, likewise; percentiles come from --data all the same."""
    out: Path = environment.RESULTS / "ablation.json"
    """JSON file."""
    settings: tuple[str, ...] = SETTINGS
    """What is taken apart: paper, percentile (the paper's rules on this model), or presets by name
    or file."""
    protocol: Literal["teacher-forced", "continuation"] = "continuation"
    """What the mechanisms act on; presets for prompts only refuse teacher-forced."""
    windows: int = 16
    """Windows of each text."""
    sweep_windows: int = 8
    """The first of them, for sweeps."""
    fit_windows: int = 8
    """Windows of --data after those, for percentiles."""
    seq_len: int = 512
    """Tokens of each window."""
    continuation_tokens: int = 128
    """Under continuation: the last tokens of each window, which are scored."""
    batch_size: int = 4
    """Windows at a time, scored or timed."""
    c4_settings: tuple[str, ...] = ("balanced",)
    """Taken apart on C4 too; of other settings all mechanisms together are scored there."""
    sweeps: bool = True
    """Score the sweeps."""
    timing: bool = True
    """Time rows; without, their seconds stay empty."""
    timed_settings: tuple[str, ...] = ("balanced", "aggressive")
    """Whose rows are timed: each compiles for 5 to 30 seconds."""
    rounds: int = 3
    """Timed runs of each row, between runs of the dense model."""
    max_minutes: float = 5.0
    """Begin no further round of timing after this long; two are made at least."""
    fresh: bool = False
    """Forget what --out holds."""


class Job(NamedTuple):
    """Everything that rows are made from.

    Attributes:
      params: Of the model, without maps.
      model: Architecture.
      windows: By name of the text: "wikitext", "c4", or a file's name.
      fitting_WT: Windows for the percentiles.
      about: What the run is; a file of another run is not gone on with.
      args: The options.
      tokenizer: For the sentence of Table 5, which is left out without it.
    """

    params: Params
    model: ModelConfig
    windows: dict[str, Windows]
    fitting_WT: np.ndarray
    about: dict[str, Any]
    args: Arguments
    tokenizer: PreTrainedTokenizerBase | None = None

    def cfg(self, qs: QuickSilverConfig | None, **changes: Any) -> Config:
        """The call that scores some mechanisms."""
        args = self.args
        fields: dict[str, Any] = {"protocol": args.protocol, "engine": "masked"} | changes
        return Config(self.model, qs, continuation_tokens=args.continuation_tokens, **fields)

    def params_for(self, case: Case) -> Params:
        """The parameters, with the maps that the case reads."""
        cfg = self.cfg(case.quicksilver)
        maps, _ = find_maps(cfg, self.args.ckpt, None, case.settings)
        return self.params if maps is None else {**self.params, "kv_maps": maps}


class Scored(NamedTuple):
    """A case on the first windows of a text."""

    case: Case
    data: str
    count: int

    @property
    def key(self) -> str:
        """Name of its measurement: equal ones are scored once."""
        return digest(self.case.quicksilver, self.data, self.count)


def prepare(args: Arguments) -> Job:
    """Read the model and the texts.

    Raises:
      InputError: A text is too short, or windows do not fit the model.
    """
    if not 2 <= args.sweep_windows <= args.windows or args.fit_windows < 1:
        raise InputError("--sweep-windows must be from 2 to --windows, --fit-windows at least 1.")
    params, model = qs_jax.load(args.ckpt, dtype="float32")
    fields: dict[str, Any] = {"continuation_tokens": args.continuation_tokens}
    check_width(args.seq_len, Config(model, protocol=args.protocol, **fields))
    tokenizer = qs_jax.load_tokenizer(args.ckpt)
    windows, texts, fitting_WT = {}, {}, None
    for data in (args.data, args.c4):
        if data is None:
            continue
        needed = args.windows + (args.fit_windows if fitting_WT is None else 0)
        text, found = read_windows(data, tokenizer, args.seq_len, needed)
        if found.tokens_WT.shape != (needed, args.seq_len):
            raise InputError(
                f"{text.name} has {found.tokens_in_text:,} tokens; {needed} windows of "
                f"{args.seq_len} are needed: lower --windows or --fit-windows, or give more text."
            )
        name = _label(text.name)
        if name in windows:
            raise InputError(f"--data and --c4 are both {name}: give another text, or --data only.")
        windows[name] = _first(found, args.windows)
        texts[name] = {"file": text.name, "sha256": text.sha256}
        if fitting_WT is None:
            fitting_WT = found.tokens_WT[args.windows :]
    assert fitting_WT is not None
    about = {
        "model": read_manifest(args.ckpt)["source"],
        "texts": texts,
        "dtype": "float32",
        **{name: getattr(args, name) for name in _IDENTITY},
    }
    return Job(params, model, windows, fitting_WT, about, args, tokenizer)


_IDENTITY = ("protocol", "windows", "sweep_windows", "fit_windows", "seq_len")
_IDENTITY += ("continuation_tokens", "batch_size")


def _label(name: str) -> str:
    known = {"wiki": "wikitext", "c4": "c4"}
    return next((label for part, label in known.items() if part in name.lower()), name)


def _first(windows: Windows, count: int) -> Windows:
    return cut_windows(
        windows.tokens_WT[:count].reshape(-1).tolist(), windows.tokens_WT.shape[1], count
    )


def plan(job: Job, fitted: dict[str, Any]) -> list[Scored]:
    """Every row in order: cases with one program follow each other."""
    args, first = job.args, next(iter(job.windows))
    off = Case("dense", "isolated", "off", QuickSilverConfig())
    found = [Scored(off, data, args.windows) for data in job.windows]
    for settings in args.settings:
        whole = ablation_rows.full(settings, job.model, fitted)
        for case in ablation_rows.decomposed(settings, whole):
            here = [first]
            if settings in args.c4_settings or case.whole:
                here = list(job.windows)
            found += [Scored(case, data, args.windows) for data in here]
    if args.sweeps:
        cases = ablation_rows.sweeps(job.model, fitted)
        # Quotas rank a whole prompt.
        kept = [c for c in cases if args.protocol == "continuation" or c.sweep != "quota"]
        found += [Scored(case, first, args.sweep_windows) for case in kept]
    return found


def measure(job: Job) -> dict[str, Any]:
    """Score what the file does not have yet, then time it; returns the file's content.

    Raises:
      InputError: The file is of another run.
    """
    content = _read(job)
    if "fitted" not in content:
        observed = observe(job.params, job.fitting_WT, job.model, batch_size=job.args.batch_size)
        content["fitted"] = observed.to_dict()
        _write(job, content)
    rows = plan(job, content["fitted"])
    for scored in rows:
        job.cfg(scored.case.quicksilver)  # refuses what cannot run before anything does
    for scored, measured in _scores(job, rows, content["measurements"]):
        content["measurements"][scored.key] = measured
        _assemble(job, rows, content)
        _write(job, content)
    if job.tokenizer is not None and "walkthrough" not in content:
        qs = ablation_rows.by_percentile(job.model, content["fitted"])
        content["walkthrough"] = walk(job.params, job.model, job.tokenizer, qs)
    timed = _timed_cases(job, rows)
    if job.args.timing and not set(timed) <= set(content.get("timing", {}).get("rows", {})):
        jax.clear_caches()  # compiled programs map memory, of which a process may have so much
        content["timing"] = _time(job, timed)
    _assemble(job, rows, content)
    _write(job, content)
    return content


def _scores(
    job: Job, rows: list[Scored], there: dict[str, Any]
) -> Iterator[tuple[Scored, dict[str, Any]]]:
    """What is still to be scored, each measurement once, with a bar over windows."""
    unique: dict[str, Scored] = {}
    for scored in rows:
        unique.setdefault(scored.key, scored)
    total = sum(scored.count for scored in unique.values())
    done = sum(scored.count for key, scored in unique.items() if key in there)
    with tqdm(total=total, initial=done, unit="window", desc="ablation") as bar:
        for key, scored in unique.items():
            if key in there:
                continue
            case = scored.case
            bar.set_postfix_str(f"{case.source} {case.name}, {scored.data}")
            windows = _first(job.windows[scored.data], scored.count)
            cfg = job.cfg(None if case.quicksilver.is_off else case.quicksilver)
            result = score_row(job.params_for(case), windows, cfg, job.args.batch_size)
            told = {"quicksilver": case.quicksilver.to_dict(), "commit": environment.commit()}
            bar.update(scored.count)
            yield scored, result | told


def _assemble(job: Job, rows: list[Scored], content: dict[str, Any]) -> None:
    """Rows, dense perplexities and synergies of what has been measured."""
    there, timing = content["measurements"], content.get("timing", {}).get("rows", {})
    dense = {s.data: there.get(s.key) for s in rows if s.case.settings == "off"}
    found = []
    for case, data, count in rows:
        measured, base = there.get(digest(case.quicksilver, data, count)), dense[data]
        if case.settings == "off" or measured is None or base is None:
            continue
        about = {"data": data, "protocol": job.args.protocol}
        row = ablation_figures.row(case, about, measured, base)
        if case.sweep is None and data == next(iter(job.windows)):
            own = timing.get(ablation_timing.key(case))
            row |= ablation_figures.timed(own, timing.get("dense"))
        found.append(row)
    content["rows"] = found
    content["synergy"] = ablation_figures.synergies(found)


def _timed_cases(job: Job, rows: list[Scored]) -> dict[str, Case]:
    return {
        ablation_timing.key(scored.case): scored.case
        for scored in rows
        if scored.case.settings in job.args.timed_settings and scored.case.sweep is None
    }


def _time(job: Job, cases: dict[str, Case]) -> dict[str, Any]:
    args, first = job.args, next(iter(job.windows))
    tokens_WT = job.windows[first].tokens_WT[: args.batch_size]
    if args.protocol == "continuation":
        tokens_WT = tokens_WT[:, : args.seq_len - args.continuation_tokens]
    cfg = job.cfg(None, engine="compact", max_new_tokens=1, eos_token_ids=())
    runs = {name: (job.params_for(case), case.quicksilver) for name, case in cases.items()}
    return ablation_timing.measure(
        job.params, tokens_WT, cfg, runs, rounds=args.rounds, seconds=60 * args.max_minutes
    )


def _read(job: Job) -> dict[str, Any]:
    out = job.args.out
    if job.args.fresh or not out.exists():
        return {"measurements": {}}
    try:
        content = json.loads(out.read_text(encoding="utf-8"))
        there, _ = content["about"], content["measurements"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{out} holds no ablation: name another --out, or pass --fresh."
        ) from error
    about = json.loads(json.dumps(job.about))
    if there != about:
        changed = [name for name in about if there.get(name) != about[name]]
        raise InputError(
            f"{out} holds another ablation ({', '.join(changed)} differ): give the same options, "
            "another --out, or --fresh."
        )
    return content


def _write(job: Job, content: dict[str, Any]) -> None:
    order = ("about", "rows", "synergy", "walkthrough", "timing", "fitted", "measurements")
    whole = content | {"about": job.about}
    ordered = {name: whole[name] for name in order if name in whole}
    job.args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(job.args.out, ordered | {"environment": environment.describe()})


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.ablation", args=argv)
    try:
        content = measure(prepare(args))
    except QuickSilverError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{len(content['rows'])} rows are in {args.out}; benchmarks.paper_tables shows them.")


if __name__ == "__main__":
    main()
