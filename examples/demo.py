"""What `make demo` shows: a real model, two prompts, and how fast it ran."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

import qs_jax
from qs_jax.cli import TextStream, encode_prompt
from qs_jax.models import count_params, param_bytes

PROMPTS = (
    "What is the capital of France? Answer in one sentence.",
    "Explain in three short sentences why the sky is blue.",
)


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
        "others one at a time.\nThe second prompt reuses the compiled programs. Now try your own:\n"
        f"  .venv/bin/python -m qs_jax generate --ckpt {args.ckpt} --chat "
        "--prompt 'Tell me a joke.'",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
