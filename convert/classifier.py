"""The head of a sequence classifier, on the way in and on the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConversionError, Problems
from convert.hf_config import HEADING
from convert.mapping import CLASSIFIER
from convert.sources import Source
from qs_jax.config import ModelConfig


def read_labels(source: Source, problems: Problems) -> tuple[str, ...]:
    """Names of a classifier's classes in the order of its head, which every attribute must share.

    Hugging Face leaves default names, LABEL_0 and so on, out of the config.
    """
    if CLASSIFIER not in source.tensors:
        raise ConversionError(f"{source.description} has no {CLASSIFIER}: not a classifier.")
    classes = next(iter(source.tensors[CLASSIFIER].shape), 0)
    config = source.config
    kind = config.get("problem_type") or "single_label_classification"
    if classes < 2 or kind != "single_label_classification":
        of = f"the head has {classes} class(es) and problem_type {kind!r}"
        problems.add(HEADING, f"{of}; a choice between classes is all that is implemented")
    indices = [str(index) for index in range(classes)]
    named = config.get("id2label") or {index: f"LABEL_{index}" for index in indices}
    if not isinstance(named, dict) or sorted(named) != sorted(indices):
        got = sorted(named) if isinstance(named, dict) else named
        problems.add(HEADING, f"id2label names {got}, the head has {classes} classes")
        return tuple(indices)
    labels = tuple(str(named[index]) for index in indices)
    if any(not isinstance(name, str | int) or not str(name).strip() for name in named.values()):
        problems.add(HEADING, f"id2label has labels that are not text: {labels}")
    if len({label.lower() for label in labels}) < classes:
        problems.add(HEADING, f"id2label gives two classes one label: {', '.join(labels)}")
    if (number := config.get("num_labels")) not in (None, classes):
        problems.add(HEADING, f"num_labels is {number!r}, the head has {classes} classes")
    back = config.get("label2id")
    for label, index in (back if isinstance(back, dict) else {}).items():
        if label in labels and str(index) != str(labels.index(label)):
            place = f"label2id has {label} at {index}, id2label at {labels.index(label)}"
            problems.add(HEADING, place)
    return labels


def export_head(ckpt: Path, model: ModelConfig) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensor and the config attributes of the head beside a checkpoint; empty without one."""
    from qs_jax.evaluation.heads import FILE_NAME, Head  # imports SciPy

    if not (ckpt / FILE_NAME).is_file():
        return {}, {}
    head = Head.load(ckpt)
    if not model.has_weights(head.backbone):
        raise ConversionError(f"{ckpt / FILE_NAME} belongs to another checkpoint: convert again.")
    if head.bias_C.any():
        raise ConversionError(f"{ckpt / FILE_NAME} has a bias; Hugging Face has none.")
    labels = dict(enumerate(head.labels))
    return {CLASSIFIER: head.weight_CD}, {
        "id2label": {str(index): label for index, label in labels.items()},
        "label2id": {label: index for index, label in labels.items()},
    }
