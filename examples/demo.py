"""What `make demo` shows: a real model answers, then what each saving buys and costs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import qs_jax
from benchmarks.timing import ratio, run_in_turn
from examples.make_report import main as make_report
from examples.text import LIGHTHOUSE, REVIEW
from qs_jax import presets
from qs_jax.compilation_cache import enable_compilation_cache
from qs_jax.config import GREEDY
from qs_jax.errors import exit_code
from qs_jax.files import write_whole
from qs_jax.models import Params, count_params, param_bytes
from qs_jax.report.figures import BLUE, GREY
from qs_jax.text import TextStream, encode_prompt
from qs_jax.timing import Stopwatch

QUESTIONS = (
    "What is the capital of France? Answer in one sentence.",
    "Explain in three short sentences why the sky is blue.",
)
# What is copied can be drafted.
COPY = (
    "Repeat the following text word for word: The old mill stands at the bend of the river, where "
    "the water slows before it falls over the weir. In spring the miller opens the three gates one "
    "after another, and the great wheel begins to turn."
)
WINDOW, SCORED, ROUNDS = 512, 128, 5


@dataclasses.dataclass
class Arguments:
    """Answer two questions, measure a preset and drafts, and write a report and a picture."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    out: Path = Path("demo")
    """Folder of the report and the picture; what is there is replaced."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""


class Comparison(NamedTuple):
    """The dense model against one way of doing less.

    Attributes:
      task: What both did.
      way: What did less.
      dense, less: Seconds of both, medians of runs in turn.
      ratio: Time over dense, the median of the runs' ratios.
      quality: What it cost.
    """

    task: str
    way: str
    dense: float
    less: float
    ratio: float
    quality: str


def main(argv: list[str] | None = None) -> None:
    """Load, answer, measure, write."""
    args = tyro.cli(Arguments, prog="python -m examples.demo", args=argv)
    enable_compilation_cache()
    console = Console(highlight=False)
    with console.status("loading the checkpoint ..."):
        params, model = qs_jax.load(args.ckpt)
        tokenizer = qs_jax.load_tokenizer(args.ckpt)
    device = jax.devices()[0]
    console.print(
        f"[bold]{escape(str(args.ckpt))}[/bold]: {model.model_type}, "
        f"{count_params(model) / 1e6:.1f} M parameters, {model.num_layers} layers, {model.dtype}, "
        f"{param_bytes(model) / 1e6:.0f} MB, on {device.platform}",
        soft_wrap=True,
    )
    cfg = qs_jax.Config(model, max_new_tokens=args.max_new_tokens, **GREEDY)
    for question in QUESTIONS:
        answer(console, params, tokenizer, question, cfg)
    with console.status("") as status:
        text = tokenizer(LIGHTHOUSE + REVIEW, verbose=False).input_ids[:WINDOW]
        status.update("compiling: a long prompt, dense and under balanced ...")
        rows = [compare_prompt(params, text, cfg)]
        status.update("compiling: an answer, plain and with drafts ...")
        rows.append(compare_answer(params, encode_prompt(tokenizer, COPY, chat=True), cfg))
    console.print(table(rows, f"{model.dtype}, {device.platform}"))
    args.out.mkdir(parents=True, exist_ok=True)
    report, picture = args.out / "report.html", args.out / "demo.png"
    draw(rows, picture)
    make_report(["--ckpt", str(args.ckpt), "--out", str(report), "--presets", "balanced"])
    console.print(
        f"\nMedians of {ROUNDS} runs taken in turn on this machine, compiling left out. One text "
        "and one answer: README.md has what was measured on many, and where nothing is gained.\n\n"
        f"  {report}   what every token of a text did at every layer (opens in a browser)\n"
        f"  {picture}      the table as a picture\n\nNow try your own:\n"
        f"  .venv/bin/python -m qs_jax generate --ckpt {escape(str(args.ckpt))} --chat "
        "--prompt 'Tell me a joke.'",
        soft_wrap=True,
    )


def answer(
    console: Console, params: Params, tokenizer: Any, question: str, cfg: qs_jax.Config
) -> None:
    """Print a question and the model's answer while it is generated."""
    console.print(f"\n[bold cyan]user[/bold cyan]  {question}", soft_wrap=True)
    console.print("[bold green]model[/bold green] ", end="")
    stream = TextStream(params, tokenizer, encode_prompt(tokenizer, question, chat=True), cfg)
    for text in stream.texts:
        console.print(text, end="", markup=False, soft_wrap=True)
    console.print(f"\n[dim]{stream.decode_rate:.0f} tokens/s[/dim]")


def compare_prompt(params: Params, ids: list[int], cfg: qs_jax.Config) -> Comparison:
    """Read a text but for its last tokens, dense and under `balanced`; both then predict these."""
    model = cfg.model
    small = presets.config("balanced", model, continuation_tokens=SCORED, **GREEDY)
    cfgs = cfg.replace(protocol="continuation", continuation_tokens=SCORED), small
    scores = [qs_jax.score(params, [ids], each).perplexity for each in cfgs]
    prompt = [ids[:-SCORED]]
    calls = [each.replace(max_new_tokens=1, eos_token_ids=()) for each in cfgs]
    seconds = time_in_turn(lambda each: qs_jax.generate(params, prompt, each), *calls)
    dense_ppl, ppl = scores
    quality = f"perplexity {dense_ppl:.2f} to {ppl:.2f} ({ppl - dense_ppl:+.2f})"
    return Comparison(f"read {len(prompt[0])} tokens", "balanced", *seconds, quality)


def compare_answer(params: Params, ids: list[int], cfg: qs_jax.Config) -> Comparison:
    """Answer with and without drafts; reading the question is in both times."""
    drafts = cfg.replace(speculate=qs_jax.Speculation())
    plain, drafted = (qs_jax.generate(params, [ids], each) for each in (cfg, drafts))
    seconds = time_in_turn(lambda each: qs_jax.generate(params, [ids], each), cfg, drafts)
    new = int(plain.lengths[0])
    same = np.array_equal(plain.sequences[0], drafted.sequences[0])
    quality = "the same text" if same else "another text: a near-tie fell the other way"
    return Comparison(f"answer in {new} tokens", "drafts", *seconds, quality)


def time_in_turn(
    call: Callable[[qs_jax.Config], Any], dense: qs_jax.Config, less: qs_jax.Config
) -> tuple[float, float, float]:
    """Seconds of both and the ratio, medians of runs in turn after a first run of each."""

    def measure(cfg: qs_jax.Config) -> dict[str, float]:
        with Stopwatch() as watch:
            call(cfg)
        return {"seconds": watch.run}

    measures = {"dense": partial(measure, dense), "less": partial(measure, less)}
    for each in measures.values():
        each()
    rows = run_in_turn(measures, ROUNDS)
    return rows["dense"]["seconds"], rows["less"]["seconds"], ratio(rows["less"])


def table(rows: list[Comparison], about: str) -> Table:
    """Seconds and quality of each comparison."""
    shown = Table(title=f"the dense model against doing less ({about})")
    for column in ("", "dense, s", "with", "s", "time"):
        shown.add_column(column, justify="left" if column in ("", "with") else "right")
    shown.add_column("quality")
    for row in rows:
        seconds = f"{row.dense:.3f}", f"{row.less:.3f}"
        shown.add_row(row.task, seconds[0], row.way, seconds[1], f"{row.ratio:.0%}", row.quality)
    return shown


def draw(rows: list[Comparison], path: Path) -> None:
    """The seconds of each comparison as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows)), rows, strict=True):
        values = row.less, row.dense
        bars = axes.barh((row.way, "dense"), values, color=(BLUE, GREY))
        axes.bar_label(bars, [f"{value:.2f} s" for value in values], padding=3)
        axes.set(title=row.task, xlabel=f"seconds\n{row.quality}", xlim=(0, 1.25 * max(values)))
        axes.spines[["top", "right"]].set_visible(False)
    with write_whole(path) as (staged,):
        figure.savefig(staged, dpi=160, format="png")


if __name__ == "__main__":
    sys.exit(exit_code(main))
