"""Classification tasks of GLUE and SuperGLUE: their fields, prompts, labels and metrics.

Prompts are those of lm-evaluation-harness (after Brown et al. 2020), with white space around a
field left out. CoLA is measured by the Matthews correlation, the others by accuracy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from qs_jax.errors import InputError
from qs_jax.evaluation.datasets import hub_rows, is_name, json_records


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
      fields: Names of each text field: that in `template`, then those in other files.
      passage: The field that is cut where an example is too long.
      labels: Names of the classes, in the order of the data set's own numbers.
      files: Names of a local file, before `.jsonl` or `.dev.jsonl`; by default `name`.
    """

    name: str
    template: str
    fields: tuple[tuple[str, ...], ...]
    passage: str
    labels: tuple[str, ...]
    metric: str = "accuracy"
    hub: str = "nyu-mll/glue"
    split: str = "validation"
    files: tuple[str, ...] = ()

    def prompt(self, fields: Mapping[str, str]) -> str:
        """The prompt of an example."""
        return self.template.format(**{name: text.strip() for name, text in fields.items()})

    def class_of(self, value: Any) -> int:
        """Number of a class from a file's label: a name, the number, or a truth value."""
        if isinstance(value, bool | str) and str(value).lower() in self.labels:
            return self.labels.index(str(value).lower())
        if type(value) is int and 0 <= value < len(self.labels):
            return value
        raise InputError(
            f"unknown label {value!r}: {self.name} has {', '.join(self.labels)}, or their numbers "
            f"0 to {len(self.labels) - 1} (test splits come without labels)."
        )


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows of a task, in the order of a file of so many `available`; texts by template name."""

    fields: tuple[dict[str, str], ...]
    labels_E: Int[np.ndarray, "E"]
    name: str
    available: int

    def take(self, index: np.ndarray) -> Examples:
        """The rows at these places."""
        fields = tuple(self.fields[i] for i in index)
        return dataclasses.replace(self, fields=fields, labels_E=self.labels_E[index])

    def describe(self) -> dict[str, Any]:
        """Origin, number and digest of the rows, for a results file."""
        content = json.dumps([*map(list, zip(self.fields, self.labels_E.tolist(), strict=True))])
        digest = hashlib.sha256(content.encode()).hexdigest()
        count = len(self.fields)
        return {"name": self.name, "rows": self.available, "used": count, "sha256": digest}


_PAIR = (("premise", "sentence1"), ("hypothesis", "sentence2"))
_SENTENCE = (("sentence",),)
_ENTAILED = ("entailment", "not_entailment")
_PROMPTS = {
    "mnli": "{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:",
    "qnli": "{question}\n{sentence}\nQuestion: Does this response answer the question?\nAnswer:",
    "sst2": "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
    "cola": "{sentence}\nQuestion: Does this sentence make sense?\nAnswer:",
    "rte": "{premise}\nQuestion: {hypothesis} True or False?\nAnswer:",
    "boolq": "{passage}\nQuestion: {question}?\nAnswer:",
}


def _task(name: str, *settings: Any, **options: Any) -> tuple[str, Task]:
    return name, Task(name, _PROMPTS[name], *settings, **options)


_MNLI = {"split": "validation_matched", "files": ("mnli_matched", "mnli")}
_BOOLQ = (("question",), ("passage",))
TASKS = dict(
    [
        _task("mnli", _PAIR, "premise", ("entailment", "neutral", "contradiction"), **_MNLI),
        _task("qnli", (("question",), *_SENTENCE), "sentence", _ENTAILED),
        _task("sst2", _SENTENCE, "sentence", ("negative", "positive")),
        _task("cola", _SENTENCE, "sentence", ("unacceptable", "acceptable"), metric="matthews"),
        _task("rte", _PAIR, "premise", _ENTAILED),
        _task("boolq", _BOOLQ, "passage", ("false", "true"), hub="aps/super_glue"),
    ]
)


def read_examples(task: Task, data: str, limit: int | None = None, seed: int = 0) -> Examples:
    """Read the labelled rows of a task, or a draw of `limit` of them without replacement.

    `data` is "hub", a .jsonl file (.gz is unpacked), or a folder that holds one of `task.files`
    with `.jsonl`, `.dev.jsonl` or `.validation.jsonl`.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, got {limit}.")
    if is_name(data, ("hub",)):
        name, unit = f"{task.hub}/{task.name} ({task.split})", "row"
        rows = enumerate(hub_rows(task.hub, task.name, task.split, list))
    else:
        path = _find_file(task, Path(data))
        name, unit, rows = path.name, "line", json_records(path)
    pairs = [_parse(task, row, f"{name}, {unit} {number}") for number, row in rows]
    if not pairs:
        raise InputError(f"{name} is empty: {task.name} needs labelled rows.")
    fields, labels = zip(*pairs, strict=True)
    sample = np.random.default_rng(seed).permutation(len(pairs))[:limit]
    return Examples(fields, np.array(labels), name, len(pairs)).take(np.sort(sample))


def split_examples(
    task: Task, examples: Examples, train_share: float, seed: int = 0
) -> tuple[Examples, Examples]:
    """Two disjoint parts, to fit a head on the first and evaluate it on the second.

    A hash of passage and seed decides the part of a row: rows that share their passage stay
    together, and `train_share`, between 0 and 1, is met only nearly.
    """
    if not 0 < train_share < 1:
        raise InputError(f"--train-share must lie between 0 and 1, got {train_share}.")
    keys = [f"{seed} {fields[task.passage]}".encode() for fields in examples.fields]
    hashes = [int.from_bytes(hashlib.sha256(key).digest()[:8], "big") for key in keys]
    trains_E = np.array([value < train_share * 2**64 for value in hashes])
    train, test = (examples.take(np.flatnonzero(part_E)) for part_E in (trains_E, ~trains_E))
    classes = set(examples.labels_E)
    if set(train.labels_E) != classes or set(test.labels_E) != classes:
        raise InputError(
            f"{examples.name}: a split of {len(keys)} rows at {train_share} leaves a part without "
            "some class; take more rows or another --seed."
        )
    return train, test


def _find_file(task: Task, path: Path) -> Path:
    if path.is_dir():
        names = "|".join(task.files or (task.name,))
        pattern = rf"({names})(\.dev|\.validation)?\.jsonl(\.gz)?"
        files = sorted(file for file in path.iterdir() if re.fullmatch(pattern, file.name))
        if len(files) != 1:
            raise InputError(
                f"{path} must hold one file of {task.name}, such as {task.name}.dev.jsonl; it has "
                f"{', '.join(file.name for file in files) or 'none'}."
            )
        return files[0]
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .jsonl file, a folder of them, or hub.")
    return path


def _parse(task: Task, row: Any, where: str) -> tuple[dict[str, str], int]:
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is not a JSON object.")
    fields = {}
    for names in task.fields:
        texts = [row[name] for name in names if isinstance(row.get(name), str)]
        if not texts:
            raise InputError(f'{where} has no field "{names[0]}" that holds a string.')
        fields[names[0]] = texts[0]
    if "label" not in row:
        raise InputError(f'{where} has no field "label".')
    try:
        return fields, task.class_of(row["label"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
