"""Perplexity in fixed windows: the text tokenised whole, cut, and scored batch by batch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from qs_jax import accounting
from qs_jax.config import Config, QuickSilverConfig
from qs_jax.engine.devices import Devices
from qs_jax.errors import InputError
from qs_jax.evaluation.datasets import Text, read_text
from qs_jax.evaluation.journal import Journal
from qs_jax.evaluation.processes import Processes
from qs_jax.evaluation.rows import score_rows
from qs_jax.models import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# More than any subword vocabulary has on ordinary text.
_CHARS_PER_TOKEN = 8
_VERSIONED = ("jax", "jaxlib", "flax", "numpy", "qs-jax")
SAVED = ("paper_flops_saved", "exact_flops_saved", "kv_bytes_saved", "layer_tokens_saved")


@dataclasses.dataclass(frozen=True)
class Windows:
    """A tokenised text in windows.

    Attributes:
      tokens_WT: int32 `[W, T]`, consecutive windows.
      tokens_in_text: Tokens of the whole text.
      left_over: Tokens after the last whole window; they are not scored.
      sha256: Of all windows' token ids as little-endian int32.
    """

    tokens_WT: Int[np.ndarray, "W T"]
    tokens_in_text: int
    left_over: int
    sha256: str


def cut_windows(ids: Sequence[int], seq_len: int, limit: int | None = None) -> Windows:
    """Cut tokens into at most `limit` consecutive windows; a text shorter than one is one."""
    if seq_len < 2:
        raise InputError(f"--seq-len must be at least 2, got {seq_len}: the first is not scored.")
    if limit is not None and limit < 1:
        raise InputError(f"--limit-windows must be at least 1, got {limit}.")
    if len(ids) < 2:
        raise InputError(f"the text must have at least 2 tokens, got {len(ids)}.")
    width = min(seq_len, len(ids))
    whole = len(ids) // width
    tokens_WT = np.asarray(ids[: whole * width], np.int32).reshape(whole, width)[:limit]
    digest = hashlib.sha256(tokens_WT.astype("<i4").tobytes()).hexdigest()
    return Windows(tokens_WT, len(ids), len(ids) - whole * width, digest)


def read_windows(
    data: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, limit: int | None = None
) -> tuple[Text, Windows]:
    """Read a text, tokenise it whole and cut it.

    Args:
      data: "wikitext-103", "c4" or a path; `./c4` is a file of that name.
      tokenizer: Of the checkpoint; what it puts before a text, it puts once.
      seq_len: Tokens of each window.
      limit: Number of windows; None takes all.

    Raises:
      InputError: The data cannot be read, or hold fewer than two tokens.
    """
    text = read_text(data, None if limit is None else limit * seq_len * _CHARS_PER_TOKEN)
    return text, cut_windows(tokenizer(text.text, verbose=False).input_ids, seq_len, limit)


def check_width(width: int, cfg: Config) -> None:
    """Refuse windows the model or the protocol has no room for, before anything is computed."""
    most = f"this model's {cfg.model.max_positions} positions"
    if width > cfg.model.max_positions:
        raise InputError(f"windows of {width} tokens exceed {most}: lower --seq-len.")
    if cfg.effective_protocol == "continuation" and width <= cfg.continuation_tokens:
        raise InputError(
            f"windows of {width} tokens have no prompt before their last {cfg.continuation_tokens}"
            ": raise --seq-len, lower --continuation-tokens, or give more text."
        )


def score_windows(
    params: Params,
    tokens_WT: Int[np.ndarray, "W T"],
    cfg: Config,
    *,
    batch_size: int,
    batches: Sequence[int] | None = None,
    devices: Devices | None = None,
) -> Iterator[dict[str, Any]]:
    """Score windows by `score_rows`, whose arguments these are; no window depends on another.

    Yields:
      Per batch: "nll", each window's total negative log-likelihood in nats (float64); "tokens",
      each window's scored positions; "counts", the tally of `qs_jax.accounting`.
    """
    width = tokens_WT.shape[1]
    check_width(width, cfg)
    prompt = width - cfg.continuation_tokens if cfg.effective_protocol == "continuation" else 0
    pairs = [(row[:prompt], row[prompt:]) for row in tokens_WT.tolist()]
    options: dict[str, Any] = {"batch_size": batch_size, "batches": batches, "devices": devices}
    for batch in score_rows(params, pairs, cfg, **options):
        yield {
            "nll": (-batch.out.logprobs.sum(axis=1, dtype=np.float64)).tolist(),
            "tokens": batch.out.mask.sum(axis=1).tolist(),
            "counts": batch.counts,
        }


def evaluate(
    params: Params,
    windows: Windows,
    cfg: Config,
    *,
    batch_size: int = 8,
    devices: Devices | None = None,
    journal: Journal | None = None,
    processes: Processes | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Perplexity of all windows, and what the mechanisms save: `results` of their scores.

    Args:
      params: From `qs_jax.load`.
      windows: What to score.
      cfg: Model, mechanisms and protocol.
      batch_size: Windows at a time.
      devices: Split each batch over these, or over a mesh; None is the default device.
      journal: Batches in it are not scored again; others are added as soon as they are scored.
      processes: Which share of the batches is this process's; None is all of them.
      progress: Show a bar with the perplexity so far.
    """
    processes = processes or Processes()
    entries = [] if journal is None else journal.entries
    append = entries.append if journal is None else journal.append
    tokens_WT, count = windows.tokens_WT, len(windows.tokens_WT)
    share = processes.share(range(-(-count // batch_size)))
    batches = share[len(entries) :]
    total = sum(min(batch_size, count - at * batch_size) for at in share)
    done = sum(len(entry["tokens"]) for entry in entries)
    options: dict[str, Any] = {"batch_size": batch_size, "batches": batches, "devices": devices}
    with tqdm(total=total, initial=done, unit="window", disable=not progress) as bar:
        for entry in score_windows(params, tokens_WT, cfg, **options):
            append(entry)
            perplexity = exp(mean_nll(entries)) or math.inf
            bar.set_postfix_str(f"perplexity {perplexity:.2f}", refresh=False)
            bar.update(len(entry["tokens"]))
    qs, why = cfg.quicksilver or QuickSilverConfig(), None
    out = results(processes.gather(entries), engine=None if qs.is_off else cfg.engine)
    if not qs.is_off and accounting.is_idle(out["counts"]):
        continues = cfg.effective_protocol == "continuation"
        why = qs.explain_idle([tokens_WT.shape[1] - cfg.continuation_tokens] * continues)
    return out | {"idle": why}


def per_window_nll(
    entries: Sequence[dict[str, Any]],
) -> tuple[Float[np.ndarray, "W"], Int[np.ndarray, "W"]]:
    """Mean negative log-likelihood of each window's scored tokens, in nats, and their number."""
    tokens_W = np.array([count for entry in entries for count in entry["tokens"]])
    return np.array([value for entry in entries for value in entry["nll"]]) / tokens_W, tokens_W


def total_counts(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The tally of all batches together."""
    return functools.reduce(accounting.add, [entry["counts"] for entry in entries])


def mean_nll(entries: Sequence[dict[str, Any]]) -> float:
    """Negative log-likelihood of all scored tokens, in nats per token."""
    total = math.fsum(value for entry in entries for value in entry["nll"])
    return total / sum(sum(entry["tokens"]) for entry in entries)


def results(entries: Sequence[dict[str, Any]], *, engine: str | None) -> dict[str, Any]:
    """Perplexity, its interval and savings of scored batches, in plain JSON types.

    Savings of the masked engine are "simulated"; `engine` is None where no mechanism ran.
    """
    per_window, tokens = per_window_nll(entries)
    counts, nll = total_counts(entries), mean_nll(entries)
    summary = accounting.summary(counts)
    return {
        "perplexity": exp(nll),
        "tokens_scored": int(tokens.sum()),
        **{name: summary[name] for name in SAVED},
        "nll": nll,
        "perplexity_interval": interval(per_window),
        "windows": len(tokens),
        "per_window": {"nll": per_window.tolist(), "tokens": tokens.tolist()},
        "counts": counts,
        "summary": summary,
        "simulated": engine == "masked",
    }


def interval(nll_W: np.ndarray) -> list[float | None] | None:
    """Student-t 95 % interval of the perplexity, windows being the sample; None for one window."""
    from scipy.stats import sem, t

    if len(nll_W) < 2:
        return None
    half = float(t.ppf(0.975, len(nll_W) - 1) * sem(nll_W))
    return [exp(float(nll_W.mean()) + side) for side in (-half, half)]


def exp(value: float) -> float | None:
    """Its exponential, or None where float64 has no such number."""
    try:
        return math.exp(value)
    except OverflowError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    packages = {name.replace("-", "_"): importlib.metadata.version(name) for name in _VERSIONED}
    return {"python": platform.python_version()} | packages


def git_hash() -> str | None:
    """The commit this library was installed from, or None if it is not in a git repository."""
    file, command = Path(__file__), ["git", "-C", str(Path(__file__).parent)]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    try:
        run([*command, "ls-files", "--error-unmatch", file.name])  # not a repository around it
        return run([*command, "rev-parse", "HEAD"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
