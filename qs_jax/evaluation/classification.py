"""Classification with a linear head, and what a preset changes on the same examples.

A head reads the final state of the last token of a prompt, or of a bare text. Accuracy has Wilson's
score interval. The Matthews correlation and all differences have percentile bootstrap intervals
over examples (Efron 1979); differences are paired, so what makes an example hard for both plays no
part. McNemar's test is the exact one.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from qs_jax import accounting
from qs_jax.accounting import flops
from qs_jax.config import Config
from qs_jax.engine.devices import replicate
from qs_jax.errors import InputError
from qs_jax.evaluation.heads import Head, fit_head
from qs_jax.evaluation.rows import score_rows
from qs_jax.evaluation.tasks import TASKS, Examples, Task, split_examples
from qs_jax.models import Params

RESAMPLES = 9999
_SEED = 0
# Resamples at a time: memory is this many times the number of examples.
_BATCH = 512
Encode = Callable[[Mapping[str, str]], list[int]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model makes of the examples of a task.

    Attributes:
      scores_EC: Of each class, float64; the highest is chosen, the first of equals.
      counts: Tally of `qs_jax.accounting`, all rows together.
    """

    scores_EC: Float[np.ndarray, "E C"]
    counts: dict[str, Any]


def encoder_of(task: Task, tokenizer: Any, *, bare: bool) -> Encode:
    """Encodes an example's fields as the task's prompt, or as a bare text or pair of texts.

    Bare texts are what Hugging Face's `run_glue.py` feeds a sequence classifier.
    """
    names = [field[0] for field in task.fields]

    def encode(fields: Mapping[str, str]) -> list[int]:
        texts = [fields[name] for name in names] if bare else [task.prompt(fields)]
        return list(tokenizer(*texts, verbose=False).input_ids)

    return encode


def encode_examples(
    task: Task, examples: Examples, encode: Encode, room: int
) -> tuple[list[list[int]], int]:
    """Encode all examples; those of more than `room` tokens lose the end of their passage.

    Returns:
      The token ids of each example, and how many were cut.

    Raises:
      InputError: An example has no tokens, or is too long without its passage.
    """
    rows, cut = [], 0
    for number, item in enumerate(examples.items):
        row = encode(item.fields)
        if len(row) > room:
            row, cut = _shorten(task, item.fields, encode, room), cut + 1
        if not 0 < len(row) <= room:
            raise InputError(
                f"{examples.name}: example {number} has {len(row)} tokens without what could be "
                f"cut; there is room for 1 to {room}."
            )
        rows.append(row)
    return rows, cut


def _shorten(task: Task, fields: Mapping[str, str], encode: Encode, room: int) -> list[int]:
    """The row with as many characters of the passage as fit."""
    passage = fields[task.passage]

    def row_of(characters: int) -> list[int]:
        return encode({**fields, task.passage: passage[:characters]})

    kept = bisect.bisect_right(range(len(passage)), room, key=lambda n: len(row_of(n))) - 1
    while kept > 0 and len(row_of(kept)) > room:  # merges make token counts not quite monotone
        kept -= 1
    return row_of(max(kept, 0))


def last_states(
    params: Params,
    cfg: Config,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    devices: Sequence[jax.Device] | None = None,
    title: str | None = None,
) -> tuple[Float[np.ndarray, "E D"], dict[str, Any]]:
    """Normed final state of each prompt's last token, float32, and the tally of the prompts.

    One more token stands after each prompt, so that the mechanisms see it as a whole, as a prefill
    does; no state depends on it, and it is not counted.

    Args:
      params: From `qs_jax.load`; with several devices, of `qs_jax.replicate`.
      cfg: Model, mechanisms and protocol.
      prompts: Token ids.
      batch_size: Rows at a time.
      devices: Split each batch over these; None is the default device.
      title: Of a progress bar on standard error; None shows none.
    """
    pairs = [(prompt, [cfg.model.pad_token_id or 0]) for prompt in prompts]
    states, counts = np.zeros((len(prompts), cfg.model.hidden_size), np.float32), None
    options: dict[str, Any] = {"batch_size": batch_size, "devices": devices}
    with tqdm(total=len(prompts), unit="row", desc=title, disable=title is None) as bar:
        for batch in score_rows(params, pairs, cfg, return_states=True, **options):
            assert batch.out.states is not None
            for row, index in enumerate(batch.index):
                states[index] = batch.out.states[row, len(prompts[index]) - 1]
            counts = accounting.add(counts, batch.counts) if counts else batch.counts
            bar.update(len(batch.index))
    assert counts is not None
    counts["decode"] = jax.tree.map(lambda value: 0 * value, counts["decode"])
    return states, counts


def with_head(
    params: Params, cfg: Config, prompts: Sequence[Sequence[int]], head: Head, **options: Any
) -> Outcome:
    """Score every class by a linear head; `options` are of `last_states`.

    The tally has the head's classes in place of the vocabulary, which did not have to run.
    """
    states_ED, counts = last_states(params, cfg, prompts, **options)
    prefill, classes = dict(counts["prefill"]), len(head.labels)
    change = 2 * cfg.model.hidden_size * classes - flops.head_flops(cfg.model)
    for name in ("exact_flops", "exact_flops_dense"):
        prefill[name] += prefill["readouts"] * change
    scores_EC = head.logits(states_ED).astype(np.float64)
    return Outcome(scores_EC, counts | {"prefill": prefill})


def measure_heads(
    params: Params,
    cfg: Config,
    examples: Mapping[str, Examples],
    tokenizer: Any,
    *,
    head: Head | None = None,
    bare: bool = False,
    fit_on: Literal["dense", "preset"] = "dense",
    train_share: float = 0.5,
    seed: int = 0,
    l2: float = 0.1,
    devices: Sequence[jax.Device] | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """All tasks by a linear head, under the dense model and, unless they are off, the mechanisms.

    Args:
      params: From `qs_jax.load`.
      cfg: Model, mechanisms and protocol.
      examples: Of each task.
      tokenizer: Of the checkpoint.
      head: A stored one; None fits one on a share of each task's examples.
      bare: Feed it the bare text or pair of texts, not the task's prompt.
      fit_on: Whose states a head is fitted on.
      train_share: Share of the examples it is fitted on; it is evaluated on the others.
      seed: Of that split.
      l2: As `fit_head`.
      devices: As `last_states`.
      **options: As `last_states`.

    Returns:
      For each task what `task_results` returns, the examples' "data", the "truncated" prompts,
      their "mean_prompt_tokens", and of a head that was fitted "fit" and "train".

    Raises:
      InputError: As `split_examples`, `encode_examples`, `fit_head` and `Head.for_task`.
    """
    params = params if devices is None else replicate(params, devices)
    shared: dict[str, Any] = {"devices": devices} | options
    # The same protocol, so that the same positions are read.
    off = cfg.replace(quicksilver=None, protocol=cfg.effective_protocol)
    room, results = cfg.model.max_positions - 1, {}
    for name, given in examples.items():
        task, about, fitted = TASKS[name], {}, head
        encode = encoder_of(task, tokenizer, bare=bare)
        if fitted is None:
            train, given = split_examples(task, given, train_share, seed)
            rows, _ = encode_examples(task, train, encode, room)
            fit_cfg = off if fit_on == "dense" else cfg
            states_ED, _ = last_states(params, fit_cfg, rows, title=f"{name}, features", **shared)
            fitted, fit = fit_head(states_ED, train.labels, task.labels, l2=l2)
            about = {"fit": fit, "train": train.describe()}
        fitted = fitted.for_task(task)
        rows, cut = encode_examples(task, given, encode, room)
        dense = with_head(params, off, rows, fitted, title=f"{name}, dense", **shared)
        other = None
        if cfg.quicksilver is not None and not cfg.quicksilver.is_off:
            other = with_head(params, cfg, rows, fitted, title=f"{name}, preset", **shared)
        about |= {"truncated": cut, "mean_prompt_tokens": sum(map(len, rows)) / len(rows)}
        measured = task_results(task, given.labels, dense, other)
        results[name] = {"data": given.describe()} | about | measured
    return results


def task_results(
    task: Task, labels_E: Int[np.ndarray, "E"], dense: Outcome, other: Outcome | None
) -> dict[str, Any]:
    """What the dense model and a preset make of the same examples, as plain JSON types.

    Args:
      task: Names the metric.
      labels_E: Class of each example.
      dense: Of the dense model.
      other: Of the preset; None where it is off.
    """
    share = np.bincount(labels_E, minlength=len(task.labels)) / len(labels_E)
    predicted = dense.scores_EC.argmax(-1)
    out: dict[str, Any] = {
        "metric": task.metric,
        "examples": len(labels_E),
        "class_shares": dict(zip(task.labels, share.tolist(), strict=True)),
        "dense": measured(task.metric, labels_E, predicted),
    }
    columns = {"label": labels_E.tolist(), "dense": dense.scores_EC.round(6).tolist()}
    if other is not None:
        changed = other.scores_EC.argmax(-1)
        saved = accounting.summary(other.counts)
        out["quicksilver"] = measured(task.metric, labels_E, changed) | {"saved": saved}
        out["difference"] = compared(task.metric, labels_E, predicted, changed)
        columns["quicksilver"] = other.scores_EC.round(6).tolist()
    return out | {"per_example": columns}


def accuracy(
    labels: Int[np.ndarray, "*batch E"], predicted: Int[np.ndarray, "*batch E"]
) -> Float[np.ndarray, "*batch"]:
    """Share of examples that are right."""
    return np.asarray((labels == predicted).mean(-1))


def matthews(
    labels: Int[np.ndarray, "*batch E"], predicted: Int[np.ndarray, "*batch E"]
) -> Float[np.ndarray, "*batch"]:
    """Matthews correlation of two classes, 0 and 1; 0 where one side has a single class."""
    y, p = np.asarray(labels, float), np.asarray(predicted, float)
    covariance = (y * p).mean(-1) - y.mean(-1) * p.mean(-1)
    spread = y.mean(-1) * (1 - y.mean(-1)) * p.mean(-1) * (1 - p.mean(-1))
    return np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)


_METRICS = {"accuracy": accuracy, "matthews": matthews}


def measured(metric: str, labels_E: np.ndarray, predicted_E: np.ndarray) -> dict[str, Any]:
    """A metric and its 95 % interval.

    Args:
      metric: "accuracy" or "matthews".
      labels_E: Class of each example.
      predicted_E: What the model chose.
    """
    from scipy.stats import binomtest

    value = float(_METRICS[metric](labels_E, predicted_E))
    if metric == "accuracy":
        right = int((labels_E == predicted_E).sum())
        found = binomtest(right, len(labels_E)).proportion_ci(0.95, method="wilson")
        interval = [float(found.low), float(found.high)]
    else:
        interval = _bootstrap(_METRICS[metric], labels_E, predicted_E)
    return {"value": value, "interval": interval}


def compared(
    metric: str, labels_E: np.ndarray, dense_E: np.ndarray, other_E: np.ndarray
) -> dict[str, Any]:
    """What changes between two models on the same examples.

    Args:
      metric: "accuracy" or "matthews".
      labels_E: Class of each example.
      dense_E: What the dense model chose.
      other_E: What the other chose.

    Returns:
      "value", other less dense, with its paired "interval"; "changed", how many predictions differ;
      "only_dense_right", "only_other_right" and "mcnemar_p" of them.
    """
    from scipy.stats import binomtest

    function = _METRICS[metric]

    def change(y: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(function(y, b) - function(y, a))

    lost = int(((dense_E == labels_E) & (other_E != labels_E)).sum())
    won = int(((dense_E != labels_E) & (other_E == labels_E)).sum())
    return {
        "value": float(change(labels_E, dense_E, other_E)),
        "interval": _bootstrap(change, labels_E, dense_E, other_E),
        "changed": int((dense_E != other_E).sum()),
        "only_dense_right": lost,
        "only_other_right": won,
        "mcnemar_p": float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0,
    }


def _bootstrap(statistic: Any, *columns: np.ndarray) -> list[float] | None:
    """Percentile interval over examples; None for a single one."""
    from scipy.stats import bootstrap

    if len(columns[0]) < 2:
        return None
    result = bootstrap(
        columns,
        lambda *c, axis: statistic(*(np.moveaxis(x, axis, -1) for x in c)),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_BATCH,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    )
    found = result.confidence_interval
    ends = [float(found.low), float(found.high)]
    return ends if all(map(math.isfinite, ends)) else None
