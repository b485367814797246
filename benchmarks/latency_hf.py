"""The same weights in Hugging Face torch: eager and SDPA attention, float32 and bfloat16.

torch is imported here and nowhere else in the latency benchmark; without it these rows are marked
as not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil

ATTENTION = ("sdpa", "eager")
# Eager attention holds rows x heads x length^2 weights: up to so many rows x length^2 it is timed.
EAGER_PAIRS = 2**23
DTYPES = ("float32", "bfloat16")
SETTINGS = tuple((attention, dtype) for dtype in DTYPES for attention in ATTENTION)


def name_of(attention: str, dtype: str) -> str:
    """Name of a row."""
    return f"HF {attention} {dtype}"


def faster_dtype(seconds: Mapping[str, float]) -> list[str]:
    """Names of the faster of both dtypes of each kind of attention, the fastest first.

    Args:
      seconds: Of a run of each row, by `name_of`.
    """
    pairs = [[name_of(attention, dtype) for dtype in DTYPES] for attention in ATTENTION]
    timed = [[name for name in pair if name in seconds] for pair in pairs]
    fastest = [min(pair, key=seconds.__getitem__) for pair in timed if pair]
    return sorted(fastest, key=seconds.__getitem__)


def left_out(section: str, attention: str, shape: tuple[int, int], vocabulary: int) -> str | None:
    """Why a row is not timed at a size; None if it is.

    Args:
      section: "prefill", "scoring" or "decode".
      attention: One of `ATTENTION`.
      shape: Rows and tokens of each.
      vocabulary: Logits of a position.
    """
    rows, width = shape
    if attention == "eager" and rows * width**2 > EAGER_PAIRS:
        return f"whole attention weights, timed up to rows x length^2 = {EAGER_PAIRS:,}"
    # Its logits in bfloat16, in float32, and their logarithms.
    logits = rows * width * vocabulary * (2 + 4 + 4)
    if section == "scoring" and logits > psutil.virtual_memory().available / 2:
        return f"logits of all positions and their logarithms take {logits / 1e9:.0f} GB"
    return None


def unavailable() -> str | None:
    """Why Hugging Face torch cannot be measured here; None if it can."""
    try:
        import torch
        import transformers
    except ImportError as error:
        return f"{error.name} is not installed"
    del torch, transformers
    return None


class LeftOut:
    """A row that says why it is not timed."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def warm(self) -> NoReturn:
        """Raises NotImplementedError with the reason."""
        raise NotImplementedError(self._reason)

    run = warm


class _Clock:
    """A stopping criterion that stops nothing and notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        del scores
        stops = input_ids[:, -1] != input_ids[:, -1]
        stops.cpu()  # waits for the token
        self.times.append(time.perf_counter())
        return stops


class HuggingFace:
    """Models of one exported folder, loaded when first used and kept."""

    def __init__(self, ckpt: Path, folder: Path) -> None:
        import torch

        from convert import flax_to_hf

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._folder = flax_to_hf.export(ckpt, folder)
        self._models: dict[tuple[str, str], Any] = {}

    def model(self, attention: str, dtype: str) -> Any:
        """The model with that attention and dtype, in inference mode."""
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        if (attention, dtype) not in self._models:
            model = AutoModelForCausalLM.from_pretrained(
                self._folder, dtype=getattr(torch, dtype), attn_implementation=attention
            )
            model.generation_config = GenerationConfig()  # its end token and sampling play no part
            self._models[attention, dtype] = model.to(self.device).eval()
        return self._models[attention, dtype]

    def runner(self, section: str, rows_NT: np.ndarray, new_tokens: int, setting: tuple[str, str]):
        """What `latency_runs.measure` times."""
        return HuggingFaceRunner(self, section, rows_NT, new_tokens, setting)


class HuggingFaceRunner:
    """One section on one setting; results come back to the host, which waits for them.

    A decode is the time between the first new token and the last, over N - 1.
    """

    def __init__(
        self,
        models: HuggingFace,
        section: str,
        rows_NT: np.ndarray,
        new_tokens: int,
        setting: tuple[str, str],
    ) -> None:
        import torch

        self._model = models.model(*setting)
        self._tokens = torch.tensor(rows_NT, dtype=torch.long, device=models.device)
        self._section, self._new_tokens = section, new_tokens

    def warm(self) -> dict[str, Any]:
        """Run once; torch compiles nothing."""
        self.run()
        return {}

    def run(self) -> dict[str, float]:
        """Seconds of the call; of a decode, seconds a new token."""
        import torch

        with torch.inference_mode():
            if self._section == "prefill":
                return self._timed(self._prefill)
            if self._section == "scoring":
                return self._timed(self._score)
            began, clock = time.perf_counter(), _Clock()
            self._generate(self._new_tokens, clock)
            seconds = (clock.times[-1] - clock.times[0]) / (self._new_tokens - 1)
            prefill = clock.times[0] - began
            return {"seconds": seconds, "call_seconds": seconds, "prefill_seconds": prefill}

    def _timed(self, call: Any) -> dict[str, float]:
        began = time.perf_counter()
        call().cpu()
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "call_seconds": seconds}

    def _prefill(self) -> Any:
        return self._model(self._tokens, logits_to_keep=1, use_cache=True).logits

    def _score(self) -> Any:
        logits = self._model(self._tokens, use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, self._tokens[:, 1:, None])

    def _generate(self, count: int, *criteria: Callable[..., Any]) -> Any:
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        settings = GenerationConfig(
            max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return self._model.generate(
            self._tokens,
            attention_mask=torch.ones_like(self._tokens),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList(criteria),
        )
