"""What `make demo` shows: a real model, two prompts, and what each preset saves."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import jax
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import qs_jax
from examples.text import LIGHTHOUSE
from qs_jax import accounting, presets
from qs_jax.compilation_cache import enable_compilation_cache
from qs_jax.config import GREEDY
from qs_jax.errors import exit_code
from qs_jax.mechanisms.kv_maps import sizes_of
from qs_jax.models import Params, count_params, param_bytes
from qs_jax.text import TextStream, encode_prompt
from qs_jax.timing import Stopwatch

PROMPTS = (
    "What is the capital of France? Answer in one sentence.",
    "Explain in three short sentences why the sky is blue.",
)


# Answered twice: what is copied can be drafted.
COPY = (
    "Repeat the following text word for word: The old mill stands at the bend of the river, where "
    "the water slows before it falls over the weir. In spring the miller opens the three gates one "
    "after another, and the great wheel begins to turn."
)

PROTOCOLS = {"teacher-forced": "every token", "continuation": "the prompt"}
CONTINUATION, STEPS, ROUNDS = 128, 16, 3


@dataclasses.dataclass
class Arguments:
    """Chat with a converted checkpoint and print tokens per second."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    presets: tuple[str, ...] = ("balanced",)
    """Rows of the table, besides the dense model."""


def main(argv: list[str] | None = None) -> None:
    """Load, answer the two prompts, print the table."""
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
    cfg = qs_jax.Config(model=model, max_new_tokens=args.max_new_tokens, **GREEDY)
    table = Table(title=f"dense model, batch 1, greedy, {model.dtype}, {device.platform}")
    table.add_column("prompt", no_wrap=True)
    columns = "prompt\ntok/s,new\ntokens,new\ntok/s,passes,drafts\nkept,compile\ns"
    for column in columns.split(","):
        table.add_column(column, justify="right")
    drafting = cfg.replace(speculate=qs_jax.Speculation())
    for prompt, way in (*((each, cfg) for each in (*PROMPTS, COPY)), (COPY, drafting)):
        who = "model" if way.speculate is None else "model, with drafts"
        console.print(
            f"\n[bold cyan]user[/bold cyan]  {prompt}\n[bold green]{who}[/bold green] ",
            end="",
            soft_wrap=True,
        )
        stream = TextStream(params, tokenizer, encode_prompt(tokenizer, prompt, chat=True), way)
        for text in stream.texts:
            console.print(text, end="", markup=False, soft_wrap=True)
        console.print()
        table.add_row(
            f"{prompt[:10]} ...",
            f"{stream.prefill_rate:.0f}",
            str(stream.new_tokens - 1),
            f"{stream.decode_rate:.1f}",
            str(stream.passes),
            f"{stream.drafted}\n{stream.accepted}",
            f"{stream.prefill.compile + stream.decode.compile:.1f}",
        )
    console.print()
    console.print(table)
    console.print(
        "Prefill reads the prompt in one pass and gives the first new token; decode gives the "
        "others one at a time.\nThe second prompt reuses the compiled programs. Drafts are looked "
        "up in what was said and verified several at a time: the same text in fewer passes.\n",
        soft_wrap=True,
    )
    ids = list(tokenizer(LIGHTHOUSE, verbose=False).input_ids)
    names = ("off", *(name for name in args.presets if name != "off"))
    with console.status("running a text under each preset ...") as status:
        rows = measure(params, ids, model, names, lambda name: status.update(f"{name} ..."))
    console.print(savings_table(rows, len(ids)))
    console.print(
        f"Measured on this machine: medians of {ROUNDS} runs taken in turn, after compiling "
        f"({sum(row.compile for row in rows):.0f} s in all). FLOPs are counted from what each "
        "token did, all other figures are seconds and bytes.\nOne short text, so differences of "
        "a few hundredths in perplexity are noise; docs/mechanisms and benchmarks/README.md "
        "have the measured tables, also of what buys nothing. Now try your own:\n"
        f"  .venv/bin/python -m qs_jax generate --ckpt {escape(str(args.ckpt))} --chat "
        "--prompt 'Tell me a joke.'",
        soft_wrap=True,
    )


@dataclasses.dataclass
class Row:
    """What one preset costs on the text.

    Attributes:
      name: Of the preset.
      acts_on: Which tokens its mechanisms touch.
      perplexity: Of the last 128 tokens.
      flops: Exact FLOPs of the prompt, as a share of dense.
      prefill: Seconds of the prompt, each run.
      step: Seconds of one new token after it, each run.
      kv_bytes: Allocated for the KV cache.
      compile: Seconds of compilation.
    """

    name: str
    acts_on: str
    perplexity: float
    flops: float
    prefill: list[float]
    step: list[float]
    kv_bytes: int
    compile: float


def measure(
    params: Params,
    ids: list[int],
    model: qs_jax.ModelConfig,
    names: tuple[str, ...],
    tell: Callable[[str], None],
) -> list[Row]:
    """Every preset on one text: quality by scoring its end, time and bytes by continuing it.

    Args:
      params: Of the model.
      ids: Tokens of the text; all but the last 128 are the prompt.
      model: Architecture.
      names: Presets; the first is what the others are compared with.
      tell: Called with each name as its programs are compiled.
    """
    calls, rows = [], []
    sizes = sizes_of(params)
    prompt = [ids[:-CONTINUATION]]
    for name in names:
        tell(name)
        quicksilver = presets.by_name(name, model)
        cfg = qs_jax.Config(model, quicksilver, eos_token_ids=(), **GREEDY)
        # The same decisions as those timed below, in a program that compiles sooner.
        whole = cfg.replace(
            protocol="continuation", continuation_tokens=CONTINUATION, engine="masked"
        )
        first, more = cfg.replace(max_new_tokens=1), cfg.replace(max_new_tokens=1 + STEPS)
        with Stopwatch() as watch:
            scored = qs_jax.score(params, [ids], whole)
            short = qs_jax.generate(params, prompt, first)
            long = qs_jax.generate(params, prompt, more)
        flops = 1.0
        if short.record is not None:
            work = accounting.summary(accounting.tally(short.record, model, quicksilver, sizes))
            flops -= work["exact_flops_saved"]
        acts_on = PROTOCOLS[cfg.effective_protocol] if name != "off" else "nothing"
        rows.append(
            Row(name, acts_on, scored.perplexity, flops, [], [], long.kv_bytes, watch.compile)
        )
        calls.append((first, more))
    for turn in range(ROUNDS):
        for row, (first, more) in zip(rows, calls, strict=True):
            tell(f"{row.name}, run {turn + 1} of {ROUNDS}")
            seconds = [_seconds(params, prompt, cfg) for cfg in (first, more)]
            row.prefill.append(seconds[0])
            row.step.append((seconds[1] - seconds[0]) / STEPS)
    return rows


def _seconds(params: Params, prompt: list[list[int]], cfg: qs_jax.Config) -> float:
    with Stopwatch() as watch:
        qs_jax.generate(params, prompt, cfg)
    return watch.run


def savings_table(rows: list[Row], length: int) -> Table:
    """The measured rows, each beside its ratio to the first."""
    table = Table(
        title=f"the mechanisms on a text of {length} tokens: seconds and bytes, measured; "
        "in brackets, against dense"
    )
    table.add_column("preset")
    table.add_column("mechanisms act on")
    for column in ("perplexity", "prompt\nseconds", "new\ntokens/s", "KV cache\nMB", "FLOPs"):
        table.add_column(column, justify="right")
    dense = rows[0]
    for row in rows:
        prefill, step = median(row.prefill), median(row.step)
        table.add_row(
            escape(row.name),
            row.acts_on,
            f"{row.perplexity:.2f}\n({row.perplexity - dense.perplexity:+.2f})",
            f"{prefill:.3f}\n({prefill / median(dense.prefill):.0%})",
            f"{1 / step:.1f}\n({median(dense.step) / step:.0%})",
            f"{row.kv_bytes / 1e6:.1f}\n({row.kv_bytes / dense.kv_bytes:.0%})",
            f"{row.flops:.0%}",
        )
    return table


if __name__ == "__main__":
    sys.exit(exit_code(main))
