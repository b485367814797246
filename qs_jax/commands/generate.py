"""`python -m qs_jax generate`: a prompt continued."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

from tyro.conf import UseAppendAction

from qs_jax.commands.options import RunOptions
from qs_jax.config import Speculation
from qs_jax.config.fields import Above0, Count, NonNegative, Positive, Probability, Ratio, Seed
from qs_jax.engine.devices import local_devices
from qs_jax.engine.inputs import check_positions
from qs_jax.evaluation.datasets import read_stdin
from qs_jax.load import load_tokenizer
from qs_jax.text import TextStream, encode_prompt


@dataclasses.dataclass(kw_only=True)
class Generate(RunOptions):
    """Continue a prompt, printing tokens as they come."""

    prompt: str
    """Text to continue; - reads it from standard input."""
    max_new_tokens: Positive = 64
    """Longest continuation, in tokens."""
    temperature: NonNegative | None = None
    """0 is greedy. This and the next four are by default what the checkpoint says, else greedy."""
    top_k: Count | None = None
    """Sample among the k most likely tokens; 0 for all."""
    top_p: Probability | None = None
    """Sample among the smallest set holding this probability; 1 for all."""
    min_p: Ratio | None = None
    """Sample among tokens with at least this share of the largest probability; 0 for all."""
    repetition_penalty: Above0 | None = None
    """Above 1 discourages tokens already present; 1 is off."""
    seed: Seed = 0
    """Of the sampler."""
    stop: Annotated[tuple[str, ...], UseAppendAction] = ()
    """End before this string; repeatable."""
    speculate: bool = False
    """Draft new tokens by prompt lookup and verify them; fast-answers does so by itself."""
    chat: bool = False
    """Put the prompt into the model's chat template, as the user's message."""
    system: str | None = None
    """System message of the chat template."""
    devices: str = "1"
    """Local devices to cut the parameters over: 1x4 for four of them."""
    quiet: bool = False
    """Print the continuation only: no prompt, no timings."""
    stats: bool = False
    """Also print how many steps the new tokens took, and how many drafted ones were kept."""

    def run(self) -> None:
        """Load, generate, report."""
        names = "max_new_tokens temperature top_k top_p min_p repetition_penalty seed stop".split()
        settings = {name: getattr(self, name) for name in names}
        if self.speculate:
            settings["speculate"] = Speculation()
        cfg = self.config(**settings)
        devices, (maps, _) = local_devices(self.devices), self.find_maps(cfg)
        prompt = read_stdin() if self.prompt == "-" else self.prompt
        tokenizer = load_tokenizer(self.folder)
        ids = encode_prompt(tokenizer, prompt, chat=self.chat, system=self.system)
        check_positions(len(ids), cfg.max_new_tokens, cfg.model)
        self.warn_of_length(cfg, len(ids))
        qs, continues = cfg.quicksilver, cfg.effective_protocol == "continuation"
        if qs is not None and not qs.is_off and continues and qs.leaves_alone(len(ids)):
            print(f"note: {qs.explain_idle([len(ids)])}", file=sys.stderr)
        stream = TextStream(self.load(maps, devices), tokenizer, ids, cfg)
        if not self.quiet and not self.chat:
            print(prompt, end="", flush=True)
        for text in stream.texts:
            print(text, end="", flush=True)
        print()
        if not self.quiet:
            print(stream.summary(stats=self.stats), file=sys.stderr)
