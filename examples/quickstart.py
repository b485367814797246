"""Load a checkpoint, continue two prompts, score a sentence, and see what a preset saves."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro

import qs_jax
from qs_jax.errors import exit_code


@dataclasses.dataclass
class Arguments:
    """Continue prompts with a converted checkpoint."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    prompts: tuple[str, ...] = ("The capital of France is", "Once upon a time, in a small town,")
    """Texts to continue; rows of different lengths are fine."""
    preset: str = "balanced"
    """Mechanisms to run."""
    max_new_tokens: int = 24
    """Longest continuation, in tokens."""


def main(argv: list[str] | None = None) -> None:
    """Generate, score, count."""
    args = tyro.cli(Arguments, prog="python -m examples.quickstart", args=argv)
    params, model = qs_jax.load(args.ckpt)
    tokenizer = qs_jax.load_tokenizer(args.ckpt)
    quicksilver = qs_jax.presets.by_name(args.preset, model)
    cfg = qs_jax.Config(model, quicksilver, max_new_tokens=args.max_new_tokens)

    out = qs_jax.generate(params, tokenizer(list(args.prompts)).input_ids, cfg)
    for row in out.sequences:
        print(tokenizer.decode(row, skip_special_tokens=True))
        print("--")
    if out.record is not None:
        print(f"layers left out: {out.record.layer_tokens_saved:.1%} of the layer-tokens")
        print(f"KV cache: {out.kv_bytes / 1e6:.2f} MB")

    dense = cfg.replace(quicksilver=None)
    scores = qs_jax.score(params, tokenizer(args.prompts[0]).input_ids, dense)
    print(f"perplexity of the first prompt, dense: {scores.perplexity:.2f}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
