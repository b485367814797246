"""Perplexity in fixed windows: the text tokenised whole, cut, and scored batch by batch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from qs_jax import accounting
from qs_jax.config import Config
from qs_jax.engine.devices import replicate
from qs_jax.engine.score import score
from qs_jax.errors import InputError
from qs_jax.evaluation.datasets import Text, read_text
from qs_jax.evaluation.journal import Journal
from qs_jax.evaluation.processes import Processes
from qs_jax.mechanisms.kv_maps import sizes_of
from qs_jax.models import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of English in any subword vocabulary; where it is too few, documents are taken again.
_CHARS_PER_TOKEN = 8
_VERSIONED = ("jax", "jaxlib", "flax", "numpy", "qs-jax")
SAVED = ("paper_flops_saved", "exact_flops_saved", "kv_bytes_saved", "layer_tokens_saved")


@dataclasses.dataclass(frozen=True)
class Windows:
    """A tokenised text in windows.

    Attributes:
      tokens_WT: int32 `[W, T]`, consecutive windows.
      tokens_in_text: Tokens of the whole text.
      left_over: Tokens after the last window that fits, in no window because they do not fill one.
      sha256: Of all windows' token ids as little-endian int32.
    """

    tokens_WT: Int[np.ndarray, "W T"]
    tokens_in_text: int
    left_over: int
    sha256: str


def cut_windows(ids: Sequence[int], seq_len: int, limit: int | None = None) -> Windows:
    """Cut tokens into consecutive windows.

    Args:
      ids: Tokens of the whole text.
      seq_len: Tokens of each window. A last one that is shorter is left out, unless it is the only
        one.
      limit: Keep this many windows from the start; None keeps all.

    Raises:
      InputError: Fewer than two tokens: a window's first token is never scored.
    """
    if seq_len < 2:
        raise InputError(f"--seq-len must be at least 2, got {seq_len}: the first is not scored.")
    if limit is not None and limit < 1:
        raise InputError(f"--limit-windows must be at least 1, got {limit}.")
    if len(ids) < 2:
        raise InputError(
            f"the text has {len(ids)} token{'' if len(ids) == 1 else 's'}; there is nothing to "
            "predict below 2."
        )
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
      data: As `read_text`.
      tokenizer: Of the checkpoint; what it puts before a text, it puts once.
      seq_len: Tokens of each window.
      limit: Number of windows; None takes all.

    Raises:
      InputError: As `read_text` and `cut_windows`.
    """
    needed = None if limit is None else limit * seq_len
    limit_chars = None if needed is None else needed * _CHARS_PER_TOKEN
    while True:
        text = read_text(data, limit_chars)
        ids = tokenizer(text.text, verbose=False).input_ids
        if text.complete or needed is None or len(ids) >= needed:
            return text, cut_windows(ids, seq_len, limit)
        assert limit_chars is not None
        limit_chars *= 2


def check_width(width: int, cfg: Config) -> None:
    """Refuse windows the model or the protocol has no room for, before anything is computed.

    Raises:
      InputError: Longer than the model's positions, or no longer than the continuation.
    """
    if width > cfg.model.max_positions:
        raise InputError(
            f"windows of {width} tokens exceed this model's {cfg.model.max_positions} positions: "
            "lower --seq-len."
        )
    if cfg.effective_protocol == "continuation" and width <= cfg.continuation_tokens:
        raise InputError(
            f"windows of {width} tokens have no prompt before their last "
            f"{cfg.continuation_tokens}: raise --seq-len, lower --continuation-tokens, or give "
            "more text."
        )


def score_windows(
    params: Params,
    windows: Windows,
    cfg: Config,
    *,
    batch_size: int,
    batches: Sequence[int] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[dict[str, Any]]:
    """Score batch after batch; a window's result depends on no other window.

    Args:
      params: From `qs_jax.load`.
      windows: What to score.
      cfg: Model, mechanisms and protocol.
      batch_size: Windows at a time.
      batches: Which to score, by index; None is all.
      devices: Split each batch over these; None is the default device.

    Yields:
      Per batch: "nll", each window's total negative log-likelihood in nats (float64); "tokens",
      each window's scored positions; "counts", the tally of `qs_jax.accounting`.
    """
    if devices is not None:
        params = replicate(params, devices)
    sizes = sizes_of(params)
    for index in range(-(-len(windows.tokens_WT) // batch_size)) if batches is None else batches:
        tokens_BT = windows.tokens_WT[index * batch_size : (index + 1) * batch_size]
        out = score(params, tokens_BT, cfg, devices=devices)
        if out.record is None:
            rows, width = tokens_BT.shape
            continued = cfg.effective_protocol == "continuation"
            prompts_B = np.full(rows, width - cfg.continuation_tokens if continued else 0)
            counts = accounting.dense_tally(np.full(rows, width), prompts_B, cfg.model)
        else:
            counts = accounting.tally(out.record, cfg.model, cfg.quicksilver, sizes)
        yield {
            "nll": (-out.logprobs.sum(axis=1, dtype=np.float64)).tolist(),
            "tokens": out.mask.sum(axis=1).tolist(),
            "counts": counts,
        }


class Evaluation(NamedTuple):
    """What `evaluate` measured.

    Attributes:
      results: Of `results`.
      tokens_per_second: In this process, of the batches after the first, which compiles; None
        without any.
    """

    results: dict[str, Any]
    tokens_per_second: float | None


def evaluate(
    params: Params,
    windows: Windows,
    cfg: Config,
    *,
    batch_size: int = 8,
    devices: Sequence[jax.Device] | None = None,
    journal: Journal | None = None,
    processes: Processes | None = None,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of all windows, and what the mechanisms save.

    Args:
      params: From `qs_jax.load`.
      windows: What to score.
      cfg: Model, mechanisms and protocol.
      batch_size: Windows at a time.
      devices: Split each batch over these; None is the default device.
      journal: Batches in it are not scored again, others are added as soon as they are scored.
      processes: Which share of the batches is this process's; None is all of them.
      progress: Show a bar with the perplexity so far.
    """
    processes = processes or Processes()
    entries = [] if journal is None else journal.entries
    append = entries.append if journal is None else journal.append
    count, width = windows.tokens_WT.shape
    share = processes.share(range(-(-count // batch_size)))
    scored = score_windows(
        params,
        windows,
        cfg,
        batch_size=batch_size,
        batches=share[len(entries) :],
        devices=devices,
    )
    total = sum(min(batch_size, count - at * batch_size) for at in share)
    done = sum(len(entry["tokens"]) for entry in entries)
    began, timed = 0.0, 0
    with tqdm(total=total, initial=done, unit="window", disable=not progress) as bar:
        for entry in scored:
            append(entry)
            timed += len(entry["tokens"]) if began else 0
            began = began or time.perf_counter()
            perplexity = exp(mean_nll(entries)) or float("inf")
            bar.set_postfix_str(f"perplexity {perplexity:.2f}", refresh=False)
            bar.update(len(entry["tokens"]))
    rate = timed * width / (time.perf_counter() - began) if timed else None
    dense = cfg.quicksilver is None or cfg.quicksilver.is_off
    measured = results(processes.gather(entries), engine=None if dense else cfg.engine)
    return Evaluation(measured, rate)


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
    """Negative log-likelihood of all scored tokens so far, in nats per token."""
    total = math.fsum(value for entry in entries for value in entry["nll"])
    return total / sum(sum(entry["tokens"]) for entry in entries)


_NOTES = {
    None: "the dense model: nothing is saved",
    "masked": "savings are counted from the mechanisms' record; the masked engine computes all",
    "compact": "savings are counted from the record of what ran; benchmarks.latency has the times",
}


def results(entries: Sequence[dict[str, Any]], *, engine: str | None) -> dict[str, Any]:
    """What all batches say together.

    Args:
      entries: Of `score_windows`, at least one.
      engine: What ran the mechanisms; None where none ran.

    Returns:
      Perplexity with its interval, per-window records, counts and savings, as plain JSON types. A
      perplexity beyond the range of float64 is None.
    """
    per_window, tokens = per_window_nll(entries)
    counts = total_counts(entries)
    summary = accounting.summary(counts)
    nll = mean_nll(entries)
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
        "note": _NOTES[engine],
    }


def interval(nll_W: np.ndarray, level: float = 0.95) -> list[float | None] | None:
    """Student-t confidence interval of the perplexity, windows being the sample.

    Args:
      nll_W: Mean negative log-likelihood of each window, in nats.
      level: Of confidence.

    Returns:
      Both ends, or None for a single window.
    """
    from scipy.stats import t

    if len(nll_W) < 2:
        return None
    error = nll_W.std(ddof=1) / math.sqrt(len(nll_W))
    half = float(t.ppf((1 + level) / 2, len(nll_W) - 1) * error)
    mean = float(nll_W.mean())
    return [exp(mean - half), exp(mean + half)]


def exp(value: float) -> float | None:
    """Its exponential, or None where float64 has no such number."""
    try:
        return math.exp(value)
    except OverflowError:
        return None


def versions() -> dict[str, str]:
    """What computes, by name."""
    found = {name.replace("-", "_"): importlib.metadata.version(name) for name in _VERSIONED}
    return {"python": platform.python_version()} | found


def git_hash() -> str | None:
    """The commit this library was installed from, or None if it is not in a git repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not a repository around it
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None
