"""What `make demo` shows: a real model, two prompts, and what each preset would save."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

import qs_jax
from examples.text import LIGHTHOUSE
from qs_jax import accounting, presets
from qs_jax.cli import TextStream, encode_prompt
from qs_jax.models import Params, count_params, param_bytes

PROMPTS = (
    "What is the capital of France? Answer in one sentence.",
    "Explain in three short sentences why the sky is blue.",
)


PROTOCOLS = {"teacher-forced": "every token", "continuation": "the prompt"}


@dataclasses.dataclass
class Arguments:
    """Chat with a converted checkpoint and print tokens per second."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """Folder written by convert.hf_to_flax."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""


def main(argv: list[str] | None = None) -> None:
    """Load, answer the two prompts, print the table."""
    args = tyro.cli(Arguments, prog="python -m examples.demo", args=argv)
    console = Console(highlight=False)
    with console.status("loading the checkpoint ..."):
        params, model = qs_jax.load(args.ckpt)
        tokenizer = qs_jax.load_tokenizer(args.ckpt)
    device = jax.devices()[0]
    console.print(
        f"[bold]{args.ckpt}[/bold]: {model.model_type}, {count_params(model) / 1e6:.1f} M "
        f"parameters, {model.num_layers} layers, {model.dtype}, "
        f"{param_bytes(model) / 1e6:.0f} MB, on {device.platform}",
        soft_wrap=True,
    )
    cfg = qs_jax.Config(model=model, max_new_tokens=args.max_new_tokens)
    table = Table(title=f"dense model, batch 1, greedy, {model.dtype}, {device.platform}")
    table.add_column("prompt")
    for column in ("prefill\ntokens", "prefill\ntokens/s", "decode\ntokens", "decode\ntokens/s"):
        table.add_column(column, justify="right")
    table.add_column("compiling\nseconds", justify="right")
    for prompt in PROMPTS:
        console.print(
            f"\n[bold cyan]user[/bold cyan]  {prompt}\n[bold green]model[/bold green] ", end=""
        )
        stream = TextStream(params, tokenizer, encode_prompt(tokenizer, prompt, chat=True), cfg)
        for text in stream.texts:
            console.print(text, end="", markup=False, soft_wrap=True)
        console.print()
        table.add_row(
            prompt,
            str(stream.prompt_tokens),
            f"{stream.prefill_rate:.0f}",
            str(stream.new_tokens - 1),
            f"{stream.decode_rate:.1f}",
            f"{stream.prefill.compile + stream.decode.compile:.1f}",
        )
    console.print()
    console.print(table)
    console.print(
        "Prefill reads the prompt in one pass and gives the first new token; decode gives the "
        "others one at a time.\nThe second prompt reuses the compiled programs.\n",
        soft_wrap=True,
    )
    with console.status("scoring a text under each preset ..."):
        ids = list(tokenizer(LIGHTHOUSE, verbose=False).input_ids)
        savings = savings_table(params, ids, model)
    console.print(savings)
    console.print(
        "One short text, so differences of a few hundredths are noise; docs/mechanisms.md has the "
        "measured tables.\nWork of 100 % means that a preset found nothing to stop; FLOPs beyond "
        "100 % are what looking for it cost. Now try your own:\n"
        f"  .venv/bin/python -m qs_jax generate --ckpt {args.ckpt} --chat "
        "--prompt 'Tell me a joke.'",
        soft_wrap=True,
    )


def savings_table(params: Params, ids: list[int], model: qs_jax.ModelConfig) -> Table:
    """Dense against each preset on one text: what it costs in perplexity, what it leaves undone.

    The last 128 tokens are scored under "continuation" (mechanisms act on the prompt before them),
    all of them under "teacher-forced".
    """
    table = Table(
        title="the four mechanisms on a built-in text; savings are simulated: counted from masks"
    )
    table.add_column("preset")
    table.add_column("mechanisms act on")
    for column in ("perplexity", "dense", "layers\nrun", "KV\nwritten", "exact\nFLOPs"):
        table.add_column(column, justify="right")
    dense: dict[str, float] = {}
    for name in ("off", "paper", "balanced", "aggressive"):
        quicksilver = presets.by_name(name, model)
        for protocol, acts_on in PROTOCOLS.items():
            if protocol == "teacher-forced" and quicksilver.prompts_only:
                continue
            cfg = qs_jax.Config(model, quicksilver, protocol=protocol)
            out = qs_jax.score(params, [ids], cfg)
            dense.setdefault(protocol, out.perplexity)
            work = {"layer_tokens_saved": 0.0, "kv_bytes_written_saved": 0.0}
            work["exact_flops_saved"] = 0.0
            if out.record is not None:
                work = accounting.summary(accounting.tally(out.record, model, quicksilver))
            table.add_row(
                name,
                acts_on,
                f"{out.perplexity:.2f}",
                f"{dense[protocol]:.2f}",
                *(
                    f"{1 - work[key]:.1%}"
                    for key in ("layer_tokens_saved", "kv_bytes_written_saved", "exact_flops_saved")
                ),
            )
    return table


if __name__ == "__main__":
    main()
