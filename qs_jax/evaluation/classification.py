"""Classification with a linear head, and what a preset changes on the same examples.

A head reads the final state of the last token of a prompt, or of a bare text. Accuracy has Wilson's
score interval. The Matthews correlation and all differences have percentile bootstrap intervals
over examples (Efron 1979); differences are paired by example. McNemar's test is the exact one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from qs_jax import accounting
from qs_jax.accounting import flops
from qs_jax.config import Config
from qs_jax.engine.devices import Devices
from qs_jax.errors import InputError
from qs_jax.evaluation.heads import Head, fit_head
from qs_jax.evaluation.rows import score_rows
from qs_jax.evaluation.tasks import TASKS, Examples, Task, split_examples
from qs_jax.models import Params

# Bootstrap; memory is "batch" times the number of examples.
_RESAMPLING: dict[str, Any] = {"paired": True, "n_resamples": 9999, "batch": 512}


class Outcome(NamedTuple):
    """Scores of each class for the examples of a task, and the tally of all rows together."""

    scores_EC: Float[np.ndarray, "E C"]
    counts: dict[str, Any]


def encode_examples(
    task: Task, examples: Examples, tokenizer: Any, room: int, *, bare: bool = False
) -> tuple[list[list[int]], int]:
    """Token ids of each example's prompt, and how many lost the end of their passage for `room`.

    A bare row is the text, or pair of texts, that `run_glue.py` feeds a sequence classifier.
    """
    rows, cut = [], 0

    def encode(fields: Mapping[str, str]) -> list[int]:
        texts = [fields[names[0]] for names in task.fields] if bare else [task.prompt(fields)]
        return list(tokenizer(*texts, verbose=False).input_ids)

    for number, fields in enumerate(examples.fields):
        row = encode(fields)
        cut += len(row) > room
        while len(row) > room and fields[task.passage]:
            # A character for each token too many; most tokens have several, so this repeats.
            fields = {**fields, task.passage: fields[task.passage][: room - len(row)]}
            row = encode(fields)
        if not 0 < len(row) <= room:
            raise InputError(
                f"{examples.name}: example {number} has {len(row)} tokens without its "
                f"{task.passage}; there is room for 1 to {room}."
            )
        rows.append(row)
    return rows, cut


def last_states(
    params: Params,
    cfg: Config,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    devices: Devices | None = None,
    title: str | None = None,
) -> tuple[Float[np.ndarray, "E D"], dict[str, Any]]:
    """Normed final state of each prompt's last token, float32, and the tally of the prompts."""
    # One more token lets the mechanisms see a prompt whole, as a prefill does; it is not counted.
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
    """Score every class by a linear head, which the tally charges in place of the vocabulary."""
    head.check_width(cfg.model.hidden_size)
    states_ED, counts = last_states(params, cfg, prompts, **options)
    prefill, classes = dict(counts["prefill"]), len(head.labels)
    change = 2 * cfg.model.hidden_size * classes - flops.head_flops(cfg.model)
    for name in ("exact_flops", "exact_flops_dense"):
        prefill[name] += prefill["readouts"] * change
    return Outcome(head.logits(states_ED), counts | {"prefill": prefill})


def measure_heads(
    params: Params,
    cfg: Config,
    examples: Mapping[str, Examples],
    tokenizer: Any,
    *,
    head: Head | None = None,
    train_share: float = 0.5,
    seed: int = 0,
    l2: float = 0.1,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """`task_results` of each task by a linear head, with how prompts were cut and a head fitted.

    A stored `head` reads bare texts. Without one, a head that reads prompts is fitted on the dense
    model's states of `train_share` of the examples and evaluated on the others.
    """
    # The same protocol, so that the same positions are read.
    off = cfg.replace(quicksilver=None, protocol=cfg.effective_protocol)
    room, results = cfg.model.max_positions - 1, {}
    for name, sample in examples.items():
        task, about, task_head = TASKS[name], {}, head
        if task_head is None:
            train, sample = split_examples(task, sample, train_share, seed)
            rows, _ = encode_examples(task, train, tokenizer, room)
            states_ED, _ = last_states(params, off, rows, title=f"{name}, features", **options)
            task_head, fit = fit_head(states_ED, train.labels_E, task.labels, l2=l2)
            about = {"fit": fit, "train": train.describe()}
        task_head = task_head.for_task(task)
        rows, cut = encode_examples(task, sample, tokenizer, room, bare=head is not None)
        dense = with_head(params, off, rows, task_head, title=f"{name}, dense", **options)
        other = None
        if cfg.quicksilver is not None and not cfg.quicksilver.is_off:
            other = with_head(params, cfg, rows, task_head, title=f"{name}, preset", **options)
        about |= {"truncated": cut, "mean_prompt_tokens": sum(map(len, rows)) / len(rows)}
        results[name] = about | task_results(task, sample, dense, other)
    return results


def task_results(
    task: Task, examples: Examples, dense: Outcome, other: Outcome | None
) -> dict[str, Any]:
    """Compare the dense model and a preset, if there is one, in plain JSON types."""
    labels_E = examples.labels_E
    share = np.bincount(labels_E, minlength=len(task.labels)) / len(labels_E)
    dense_E = dense.scores_EC.argmax(-1)
    out: dict[str, Any] = {
        "data": examples.describe(),
        "metric": task.metric,
        "examples": len(labels_E),
        "class_shares": dict(zip(task.labels, share.tolist(), strict=True)),
        "dense": measure(task.metric, labels_E, dense_E),
    }
    columns = {"label": labels_E.tolist(), "dense": dense.scores_EC.round(6).tolist()}
    if other is not None:
        other_E, saved = other.scores_EC.argmax(-1), accounting.summary(other.counts)
        out["quicksilver"] = measure(task.metric, labels_E, other_E) | {"saved": saved}
        out["quicksilver"]["idle"] = accounting.is_idle(other.counts)
        out["difference"] = compare(task.metric, labels_E, dense_E, other_E)
        columns["quicksilver"] = other.scores_EC.round(6).tolist()
    return out | {"per_example": columns}


def accuracy(labels_E: np.ndarray, predicted_E: np.ndarray, axis: int = -1) -> Any:
    """Share of examples that are right."""
    return (labels_E == predicted_E).mean(axis)


def matthews(labels_E: np.ndarray, predicted_E: np.ndarray, axis: int = -1) -> Any:
    """Matthews correlation of two classes, 0 and 1; 0 where one side has a single class."""
    covariance = (labels_E * predicted_E).mean(axis) - labels_E.mean(axis) * predicted_E.mean(axis)
    return covariance / np.sqrt(np.maximum(labels_E.var(axis) * predicted_E.var(axis), 1e-30))


_METRICS = {"accuracy": accuracy, "matthews": matthews}


def measure(metric: str, labels_E: np.ndarray, predicted_E: np.ndarray) -> dict[str, Any]:
    """A metric ("accuracy" or "matthews") as "value", with its 95 % "interval"."""
    from scipy.stats import binomtest

    if metric == "accuracy":
        right = binomtest(int((labels_E == predicted_E).sum()), len(labels_E))
        ends = right.proportion_ci(0.95, method="wilson")
        return {"value": float(right.statistic), "interval": [float(ends.low), float(ends.high)]}
    value = float(_METRICS[metric](labels_E, predicted_E))
    return {"value": value, "interval": _bootstrap(_METRICS[metric], labels_E, predicted_E)}


def compare(
    metric: str, labels_E: np.ndarray, dense_E: np.ndarray, other_E: np.ndarray
) -> dict[str, Any]:
    """Difference of two models' choices on the same examples, other less dense, by McNemar too."""
    function = _METRICS[metric]

    def change(y: np.ndarray, a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
        return function(y, b, axis) - function(y, a, axis)

    lost = int(((dense_E == labels_E) & (other_E != labels_E)).sum())
    won = int(((dense_E != labels_E) & (other_E == labels_E)).sum())
    return {
        "value": float(change(labels_E, dense_E, other_E)),
        "interval": _bootstrap(change, labels_E, dense_E, other_E),
        "changed": int((dense_E != other_E).sum()),
        "only_dense_right": lost,
        "only_other_right": won,
        "mcnemar_p": mcnemar_p(lost, won),
    }


def mcnemar_p(lost: int, won: int) -> float:
    """Exact two-sided p-value of McNemar's test, from the pairs that only one side got right."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def _bootstrap(statistic: Any, *columns: np.ndarray) -> list[float] | None:
    """Percentile interval over examples; None for a single one."""
    from scipy.stats import bootstrap

    if len(columns[0]) < 2:
        return None
    rng = np.random.default_rng(0)
    ends = bootstrap(columns, statistic, method="percentile", rng=rng, **_RESAMPLING)
    return [float(end) for end in ends.confidence_interval]
