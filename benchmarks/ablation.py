"""Each mechanism alone and added up, and bits by entropy (paper Tables 3, 5, 10 and 11).

`python -m benchmarks.ablation --ckpt DIR --data FILE` scores the first windows of a text, writes
the JSON file after each row (a stopped run goes on where it was), and then times prefills of the
fast engines in turn with the dense model. Counted savings are simulated.

H is halting, K is KV skipping, F is fusion, Q is adaptive quantization (paper, appendix P).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qs_jax
from benchmarks import environment, mechanism_rows
from benchmarks.latency_rows import OurCall
from benchmarks.mechanism_rows import CONTINUATION, Row
from benchmarks.mechanisms import Inputs, paired_change, score_rows
from benchmarks.timing import ratio, run_in_turn
from qs_jax import presets
from qs_jax.config import (
    AMQConfig,
    Config,
    FusionConfig,
    KVSkipConfig,
    ModelConfig,
    QuickSilverConfig,
)
from qs_jax.engine.prompt_plan import refusal
from qs_jax.errors import exit_code
from qs_jax.models import Params

ALL_FOUR = "all four"
LETTERS = {"H": "halting", "K": "kv_skip", "F": "fusion", "Q": "amq"}
DENSE = Row("dense", "dense", CONTINUATION, QuickSilverConfig())
# Of the paper's Tables 3 and 10, by name: below the first 2 bits, below the second 4, else 8.
BITS: dict[str, tuple[float, float]] = {
    "2/4/8 bits (1.0, 2.3)": (1.0, 2.3),
    "4/8 bits (2.3)": (float("-inf"), 2.3),
    "2/4 bits (1.2)": (1.2, float("inf")),
}
# The sentence of the paper's Table 5.
SENTENCE = (
    "This is a long sentence designed to demonstrate how dynamic token halting enhanced KV cache "
    "optimization and contextual token fusion work together to accelerate inference by reducing "
    "redundant computations and merging similar tokens."
)


@dataclasses.dataclass
class Arguments(Inputs):
    """Score and time the ablation; mechanisms act on all of a window but its last 128 tokens."""

    fit_windows: int = 4
    """Windows after those, for percentiles."""
    out: Path = environment.RESULTS / "ablation.json"
    """JSON file."""
    settings: tuple[str, ...] = ("paper", "percentile", "balanced", ALL_FOUR)
    """What is taken apart: paper, percentile (the paper's rules on this model), all four, or
    presets by name or file."""
    timed: tuple[str, ...] = ("balanced", ALL_FOUR)
    """Whose rows are timed, three times: each compiles for 5 to 30 seconds."""


def all_four(model: ModelConfig) -> QuickSilverConfig:
    """All mechanisms on a prompt, with settings that act on any model.

    Half of it stops at two thirds of the depth and nearly all of it at 0.9, keys of halted tokens
    are skipped, near-identical neighbours fuse, and products are in int8 from the middle on.
    """
    middle, halting = max(model.num_layers // 2, 1), presets.quota(model, {2 / 3: 0.5, 0.9: 0.9})
    fusion = FusionConfig(tau_fuse=0.35, distance="relative", first_layer=middle)
    bits = AMQConfig.uniform(8, layer=middle, group=presets.group(model), execution="int8")
    return QuickSilverConfig(halting, KVSkipConfig(), fusion, bits)


def mechanisms(qs: QuickSilverConfig | None) -> str:
    """Letters of what runs."""
    on = [letter for letter, field in LETTERS.items() if getattr(qs, field, None) is not None]
    if qs is not None and qs.halting is not None and not qs.halting.freeze:
        on.remove("H")  # flags only
    return "".join(on)


def take_apart(settings: str, whole: QuickSilverConfig) -> dict[str, Row]:
    """Each mechanism alone, then added one after the other, by letters (paper Table 11).

    K alone is left out where keys are computed for every token: they are nothing without halting.
    """
    there = [letter for letter, field in LETTERS.items() if getattr(whole, field) is not None]
    computes = whole.kv_skip is not None and whole.kv_skip.policy in ("propagate", "extrapolate")
    alone = [letter for letter in there if letter != "K" or not computes]
    together = ["+".join(there[:count]) for count in range(1, len(there) + 1)]
    return {
        letters: Row(settings, letters, CONTINUATION, mechanism_rows.only(whole, letters))
        for letters in (*alone, *together)
    }


def plan(args: Arguments, model: ModelConfig, fitted: dict[str, Any]) -> Iterator[Row]:
    """Every row in order."""
    yield DENSE
    paper = presets.NAMES["paper-bits-vocab"](model)
    known = {"paper": paper, "percentile": mechanism_rows.by_percentiles(model, fitted)}
    known[ALL_FOUR] = all_four(model)
    for settings in args.settings:
        whole = known.get(settings) or presets.by_name(settings, model)
        yield from take_apart(settings, whole).values()
    assert paper.amq is not None
    uniform = AMQConfig.uniform(8, paper.amq.layer, group=paper.amq.group)
    yield Row("bits", "8 bits", CONTINUATION, QuickSilverConfig(amq=uniform))
    for name, (low, high) in BITS.items():
        amq = dataclasses.replace(paper.amq, tau_low=low, tau_high=high)
        yield Row("bits", name, CONTINUATION, QuickSilverConfig(amq=amq))


def measure(args: Arguments) -> None:
    """Score what the file does not have yet, then time it."""
    params, model, windows_WT, about = args.read()
    content = environment.read(args.out, about, {"about": about, "measurements": {}})
    if "fitted" not in content:
        fitting_WT = windows_WT[args.windows :]
        content["fitted"] = mechanism_rows.percentiles(params, fitting_WT, model)
    rows = list(plan(args, model, content["fitted"]))

    def save() -> None:
        content["rows"] = list(assemble(rows, content))
        environment.write(args.out.stem, content, args.out)

    # Refuses what cannot run before anything does.
    cfgs = {row.key: Config(model, row.quicksilver, protocol=CONTINUATION) for row in rows}

    def params_for(row: Row) -> Params:
        return environment.attach_maps(params, cfgs[row.key], args.ckpt, row.section)

    scored_WT = windows_WT[: args.windows]
    score_rows(rows, content["measurements"], scored_WT, model, args.batch_size, params_for, save)
    if "walkthrough" not in content:
        qs = mechanism_rows.by_percentiles(model, content["fitted"])
        cfg = Config(model, qs, protocol="teacher-forced", engine="masked")
        content["walkthrough"] = walk(params, qs_jax.load_tokenizer(args.ckpt), cfg)
    timed = {
        row.key: row
        for row in rows
        if row.section in ("dense", *args.timed)
        and refusal(cfgs[row.key], generates=True) is None  # quality only
    }
    if not set(timed) <= set(content.get("timing", {}).get("rows", {})):
        jax.clear_caches()  # compiled programs map memory, of which a process may have so much
        prompts = scored_WT[: args.batch_size, : args.seq_len - 128]
        one: dict[str, Any] = {"engine": "compact", "max_new_tokens": 1, "eos_token_ids": ()}
        calls = {
            key: OurCall(params_for(row), prompts, "prefill", cfgs[key].replace(**one))
            for key, row in timed.items()
        }
        warm = {key: call.warm() for key, call in calls.items()}
        runs = run_in_turn(calls, 3, baseline=DENSE.key)
        times = {key: warm[key] | runs[key] for key in warm}
        content["timing"] = {"rows": times, "shape": prompts.shape, "commit": environment.commit()}
    save()


def assemble(rows: list[Row], content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of the result, of what has been measured: shares are of the prompts."""
    measured, timing = content["measurements"], content.get("timing", {}).get("rows", {})
    for row in (row for row in rows[1:] if row.key in measured):
        kinds = ["cumulative"] if "+" in row.name else ["isolated"]
        kinds = ["isolated", "cumulative"] if row.name == "H" else kinds
        saved = dict(measured[row.key]["saved"]["prefill"])
        timed = timing.get(row.key)
        for kind in ["sweep"] if row.section == "bits" else kinds:
            yield {
                "name": row.name,
                "mechanisms": mechanisms(row.quicksilver),
                "kind": kind,
                "settings": Path(row.section).name,
                "sweep": "bits" if kind == "sweep" else None,
                "data": content["about"]["text"],
                "protocol": row.protocol,
                **paired_change(measured[row.key], measured[DENSE.key]),
                **{name: share for name, share in saved.items() if "_saved" in name},
                "simulated": True,
                "seconds": timed and timed["seconds"],
                "time_saved": timed and 1 - ratio(timed),
                "timed_mechanisms": mechanisms(row.quicksilver),
            }


def walk(params: Params, tokenizer: Any, cfg: Config) -> dict[str, Any]:
    """What each token of Table 5's sentence went through, scored teacher-forced.

    Of each "depth" is the layers run, "kv_layers" those that hold its keys at the end, and
    "fused_into" the position of the token that stands for it, or None.
    """
    ids = np.asarray(tokenizer(SENTENCE).input_ids, np.int32)[None]
    record = qs_jax.score(params, ids, cfg).record
    assert record is not None
    tokens = []
    for at, (token, into) in enumerate(zip(ids[0], record.representative[0], strict=True)):
        went = {"text": tokenizer.decode([int(token)]), "depth": int(record.depth[0, at])}
        went |= {"kv_layers": int(record.kv_held[:, 0, at].sum())}
        went |= {"bits": int(record.bits[-1, 0, at])}
        tokens.append(went | {"fused_into": int(into) if into != at else None})
    return {"layers": cfg.model.num_layers, "tokens": tokens}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    environment.run_command("ablation", Arguments, measure, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
