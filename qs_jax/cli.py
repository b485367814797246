"""The command line: `python -m qs_jax COMMAND`, also installed as `qs-jax`."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from qs_jax.commands.calibrate import Calibrate
from qs_jax.commands.diagnose import Diagnose
from qs_jax.commands.evaluate import Evaluate
from qs_jax.commands.maps import find_maps
from qs_jax.commands.report import Report
from qs_jax.commands.tasks import Tasks
from qs_jax.errors import InputError, QuickSilverError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qs_jax.config import Config
    from qs_jax.models import Params


@dataclasses.dataclass
class Generate:
    """Continue a prompt, printing tokens as they come."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""
    prompt: str
    """Text to continue; - reads it from standard input."""
    preset: str = "off"
    """Mechanisms to run: off (dense), paper, balanced, aggressive, another name, or FILE.json."""
    protocol: Literal["teacher-forced", "continuation"] | None = None
    """Mechanisms act on every token, or on the prompt only. By default on every token, unless the
    preset can act on prompts only."""
    kv_maps: Path | None = None
    """Maps of the "extrapolate" policy; by default those beside the preset's file, or
    kv_maps.safetensors in the checkpoint folder."""
    max_new_tokens: int = 64
    """Longest continuation, in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    top_p: float | None = None
    """Sample among the smallest set holding this probability."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens already present."""
    seed: int = 0
    """Of the sampler."""
    chat: bool = False
    """Put the prompt into the model's chat template, as the user's message."""
    system: str | None = None
    """System message of the chat template."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = "auto"
    """Convert parameters while loading; auto takes the faster on this device, None keeps them."""
    quiet: bool = False
    """Print the continuation only: no prompt, no timings."""

    def run(self) -> None:
        """Load, generate, report."""
        from qs_jax import Config, load, load_tokenizer, presets

        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        tokenizer = load_tokenizer(self.ckpt)
        ids = encode_prompt(tokenizer, prompt, chat=self.chat, system=self.system)
        params, model = load(self.ckpt, dtype=self.dtype)
        cfg = Config(
            model=model,
            quicksilver=presets.by_name(self.preset, model),
            protocol=self.protocol,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )
        maps, _ = find_maps(cfg, self.ckpt, self.kv_maps, self.preset)
        if maps is not None:
            params["kv_maps"] = maps
        stream = TextStream(params, tokenizer, ids, cfg)
        if not self.quiet and not self.chat:
            print(prompt, end="", flush=True)
        for text in stream.texts:
            print(text, end="", flush=True)
        print()
        if not self.quiet:
            print(stream.summary(), file=sys.stderr)


@dataclasses.dataclass
class Info:
    """Say what a converted checkpoint holds."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""

    def run(self) -> None:
        """Print the manifest as a table."""
        from rich.console import Console
        from rich.table import Table

        from qs_jax.checkpoint import read_manifest

        manifest = read_manifest(self.ckpt)
        table = Table(title=str(self.ckpt), show_header=False)
        rows = {
            "source": manifest["source"],
            "parameters": f"{manifest['num_params']:,}",
            "bytes on disk": f"{manifest['params']['bytes']:,}",
        }
        for name, value in (rows | manifest["model"]).items():
            table.add_row(name, str(value))
        Console().print(table)


class TextStream:
    """Text of one row as it is generated, and how long it took.

    Attributes:
      texts: Iterator over pieces of text; timings are complete when it ends.
      prompt_tokens: Tokens of the prompt.
      new_tokens: Tokens produced so far.
    """

    def __init__(
        self, params: Params, tokenizer: PreTrainedTokenizerBase, ids: list[int], cfg: Config
    ) -> None:
        from qs_jax.detokenize import Detokenizer
        from qs_jax.engine.generate import stream
        from qs_jax.timing import Stopwatch

        self.prompt_tokens, self.new_tokens = len(ids), 0
        self.prefill, self.decode = Stopwatch(), Stopwatch()
        self._steps = stream(params, [ids], cfg)  # checks the input at once
        self._detokenizer = Detokenizer(tokenizer, ids)
        self.texts = self._texts()

    def _texts(self) -> Iterator[str]:
        watch = self.prefill
        while True:
            with watch:
                step = next(self._steps, None)
            if step is None:
                break
            watch = self.decode
            self.new_tokens += 1
            if text := self._detokenizer.push(int(step.tokens[0])):
                yield text
        if text := self._detokenizer.flush():
            yield text

    def summary(self) -> str:
        """One line: tokens per second of prefill and decode, and seconds of compilation."""
        compiled = self.prefill.compile + self.decode.compile
        line = (
            f"prefill {self.prompt_tokens} tokens in {self.prefill.run:.2f} s "
            f"({self.prefill_rate:.0f} tokens/s)"
        )
        if self.new_tokens > 1:
            line += (
                f" · decode {self.new_tokens - 1} tokens in {self.decode.run:.2f} s "
                f"({self.decode_rate:.1f} tokens/s)"
            )
        return f"[{line} · compiling {compiled:.1f} s]"

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second; the first new token comes with them."""
        return self.prompt_tokens / max(self.prefill.run, 1e-9)

    @property
    def decode_rate(self) -> float:
        """New tokens a second, the first one not counted."""
        return (self.new_tokens - 1) / max(self.decode.run, 1e-9)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    chat: bool = False,
    system: str | None = None,
) -> list[int]:
    """Token ids of a prompt, in the model's chat template if asked for.

    Raises:
      InputError: The prompt is empty, or there is no chat template.
    """
    if not prompt:
        raise InputError("the prompt is empty.")
    try:
        (prompt + (system or "")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not valid UTF-8.") from error
    if system is not None and not chat:
        raise InputError("--system needs --chat.")
    if not chat:
        ids = tokenizer(prompt).input_ids
    elif tokenizer.chat_template is None:
        raise InputError("this checkpoint has no chat template; leave out --chat.")
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates raise what they like
            raise InputError(f"the chat template refused these messages: {error}") from error
        ids = tokenizer(str(text), add_special_tokens=False).input_ids
    if not ids:
        raise InputError("the prompt has no tokens.")
    return list(ids)


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Tasks, tyro.conf.subcommand("tasks")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows a ?
        sys.stdout.reconfigure(errors="replace")
    command = tyro.cli(Command, prog="qs-jax", args=argv)  # type: ignore[call-overload]
    try:
        command.run()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (QuickSilverError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UnicodeDecodeError as error:
        print(f"error: standard input is not UTF-8 ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0
