"""Decoding with drafts against plain decoding, and the table of benchmarks/README.md.

`python -m benchmarks.decode --ckpt DIR --data FILE` continues prompts of six kinds, and text, one
row at a time and eight at a time, without and with `Speculation()` in turn. A time is that of the
loop over new tokens, prefill and compilation left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

import qs_jax
from benchmarks import environment, timing
from benchmarks.decode_prompts import PROMPTS
from benchmarks.tables import markdown, origin
from qs_jax.compilation_cache import enable_compilation_cache
from qs_jax.config import GREEDY, Config, Speculation
from qs_jax.errors import exit_code
from qs_jax.evaluation.datasets import read_text_or_file
from qs_jax.text import encode_prompt

WAYS = {"plain": None, "lookup": Speculation()}
TEXT = "text"
WINDOW, BATCH = 128, 8


@dataclasses.dataclass
class Arguments:
    """Measure drafts."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    data: Path | None = None
    """Plain text to continue; without it there are the prompts only."""
    new_tokens: int = 96
    """Longest continuation."""
    rounds: int = 6
    """Runs of each prompt each way."""
    quick: bool = False
    """48 new tokens, two rounds."""
    out: Path = environment.RESULTS / "decode.json"
    """JSON file."""


def prompts_of(args: Arguments) -> dict[str, list[list[int]]]:
    """Tokens of each kind's prompts, and of windows of the text."""
    tokenizer = qs_jax.load_tokenizer(args.ckpt)
    kinds = {
        kind: [encode_prompt(tokenizer, text, chat=True) for text in texts]
        for kind, texts in PROMPTS.items()
    }
    if args.data is not None:
        ids = tokenizer(read_text_or_file(str(args.data)).text[:200_000], verbose=False).input_ids
        kinds[TEXT] = [ids[at * 4 * WINDOW :][:WINDOW] for at in range(4)]
    return kinds


def run(args: Arguments) -> None:
    """Tokens in float32, then times in bfloat16."""
    environment.check_out(args.out)
    if args.quick:
        args = dataclasses.replace(args, new_tokens=48, rounds=2)
    kinds = prompts_of(args)
    same = _same_share(args, list(itertools.chain(*kinds.values())))
    groups = {(kind, 1): [[row] for row in rows] for kind, rows in kinds.items()}
    mixed = [row for kind, rows in kinds.items() if kind != TEXT for row in rows]
    count = len(mixed) // BATCH
    groups["all", BATCH] = [mixed[at::count] for at in range(count)]
    runs = measure(args, groups)
    rows = [_row(*key, found) for key, found in runs.items()]
    single = {kind: found for (kind, batch), found in runs.items() if batch == 1}
    asked = [found for kind, found in single.items() if kind != TEXT]
    rows.insert(len(asked), _row("all", 1, _joined(asked)))
    copying = _joined([single["copy"], single["code"]])
    by_kind = {row["kind"]: row["ratio"] for row in rows if row["rows"] == 1}
    content = {
        "lookup_over_plain": by_kind["all"],
        "lookup_over_plain_copy_code": _row("copy and code", 1, copying)["ratio"],
        "worst_kind": min(by_kind.values()),
        "same_tokens_float32": same,
        "rows": rows,
        "about": {
            "model": args.ckpt.name,
            "dtype": "bfloat16",
            "new_tokens": args.new_tokens,
            "rounds": args.rounds,
        }
        | ({} if args.data is None else {"text": args.data.name}),
    }
    environment.write("decode", content, args.out)


def _configs(args: Arguments, model: qs_jax.ModelConfig) -> dict[str, Config]:
    plain = Config(model, max_new_tokens=args.new_tokens, **GREEDY)
    return {name: plain.replace(speculate=way) for name, way in WAYS.items()}


def _same_share(args: Arguments, prompts: Sequence[list[int]]) -> float:
    """Share of prompts that are continued by the same tokens in float32."""
    params, model = qs_jax.load(args.ckpt, dtype="float32")
    cfgs, same = _configs(args, model), []
    for prompt in tqdm(prompts, "float32"):
        plain, drafted = (qs_jax.generate(params, [prompt], cfg).tokens for cfg in cfgs.values())
        same.append(np.array_equal(plain, drafted))
    return float(np.mean(same))


def measure(args: Arguments, groups: dict[tuple[str, int], list[Any]]) -> dict[Any, list[Any]]:
    """By kind and rows, for each round and way: seconds, tokens, passes, and equal texts."""
    params, model = qs_jax.load(args.ckpt, dtype="bfloat16")
    cfgs, found = _configs(args, model), {}
    with tqdm(total=(args.rounds + 1) * sum(map(len, groups.values())), desc="bfloat16") as bar:
        for key, calls in groups.items():
            totals = [{name: np.zeros(4) for name in WAYS} for _ in range(args.rounds + 1)]
            for call, turn in itertools.product(calls, range(args.rounds + 1)):
                names = list(WAYS) if turn % 2 else list(WAYS)[::-1]
                outs = {name: _timed(params, call, cfgs[name]) for name in names}
                for name, (seconds, out) in outs.items():
                    equal = (out.tokens == outs["plain"][1].tokens).all(1).sum()
                    tokens = (out.lengths - 1).sum()
                    totals[turn][name] += (seconds, tokens, out.passes.sum(), equal)
                bar.update()
            found[key] = totals[1:]  # the first compiles
    return found


def _timed(params: Any, call: Any, cfg: Config) -> tuple[float, qs_jax.GenerateOutput]:
    with timing.watch() as seen:
        out = qs_jax.generate(params, call, cfg)
    return seen.spent.get("run_until", 0.0), out


def _joined(parts: list[list[Any]]) -> list[Any]:
    """Rounds of several kinds together."""
    return [
        {name: sum(each[name] for each in turn) for name in WAYS}
        for turn in zip(*parts, strict=True)
    ]


def _row(kind: str, rows: int, turns: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """One line of the table: plain time over time with drafts, each a token's."""
    a_token = {name: [float(turn[name][0] / turn[name][1]) for turn in turns] for name in WAYS}
    ratios = [a / b for a, b in zip(a_token["plain"], a_token["lookup"], strict=True)]
    interval = timing.interval(
        {"runs": {"s": a_token["plain"], "baseline_s": a_token["lookup"]}}, "s"
    )
    _, tokens, passes, _ = turns[0]["lookup"]
    equal, texts = turns[0]["lookup"][3], turns[0]["plain"][3]
    return {
        "kind": kind,
        "rows": rows,
        "plain_ms": 1e3 * median(a_token["plain"]),
        "lookup_ms": 1e3 * median(a_token["lookup"]),
        "ratio": median(ratios),
        "interval": interval,
        "tokens_per_pass": float(tokens / passes),
        "texts": int(texts),
        "same_texts": int(equal),
    }


def table(content: dict[str, Any]) -> pd.DataFrame:
    """Rows as they are shown."""

    def line(row: dict[str, Any]) -> dict[str, Any]:
        low, high = row["interval"] or (None, None)
        return {
            "prompts": row["kind"],
            "rows": row["rows"],
            "plain, ms a token": f"{row['plain_ms']:.1f}",
            "lookup, ms a token": f"{row['lookup_ms']:.1f}",
            "plain / lookup": f"{row['ratio']:.2f}",
            "95 %": "" if low is None else f"{low:.2f} to {high:.2f}",
            "tokens a pass": f"{row['tokens_per_pass']:.2f}",
            "same text": f"{row['same_texts']} of {row['texts']}",
        }

    return pd.DataFrame([line(row) for row in content["rows"]])


def tables(content: dict[str, Any]) -> dict[str, str]:
    """The table, and what it was made with."""
    return {"decode": markdown(table(content)), "decode origin": origin(content)}


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.decode", args=argv)
    enable_compilation_cache()
    run(args)
    print(tables(json.loads(args.out.read_bytes()))["decode"])


if __name__ == "__main__":
    sys.exit(exit_code(main))
