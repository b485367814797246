"""Linear classification heads on the state of a prompt's last token, stored and fitted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qs_jax.engine.weights import check_finite
from qs_jax.errors import CheckpointError, InputError, NonFiniteError
from qs_jax.evaluation.tasks import Task
from qs_jax.files import write_whole

FILE_NAME = "classifier.safetensors"


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear classifier of final states; `backbone` is the fingerprint of its weights."""

    weight_CD: Float[np.ndarray, "C D"]
    bias_C: Float[np.ndarray, "C"]
    labels: tuple[str, ...]
    backbone: str | None = None

    def __post_init__(self) -> None:
        classes = len(self.labels)
        if not classes or len({label for label in self.labels if type(label) is str}) < classes:
            raise InputError(f"a head needs a name of its own for each class, got {self.labels}.")
        for name, tensor in (("weight", self.weight_CD), ("bias", self.bias_C)):
            found, rank = f"{tensor.dtype}{list(tensor.shape)}", 2 - (name == "bias")
            if tensor.dtype != np.float32 or tensor.ndim != rank or len(tensor) != classes:
                shape = f"float32[{classes}{', width' * (rank - 1)}]"
                raise InputError(f"the {name} of the head is {found}, expected {shape}.")
            if not np.isfinite(tensor).all():
                raise NonFiniteError(f"the {name} of the head holds NaN or infinity.")

    def check_width(self, width: int) -> None:
        """Refuse states of another width than the head reads."""
        if width != self.weight_CD.shape[1]:
            reads = self.weight_CD.shape[1]
            raise InputError(f"the head reads states of width {reads}, this model's have {width}.")

    def logits(self, states_ED: Float[np.ndarray, "E D"]) -> Float[np.ndarray, "E C"]:
        """Scores of each class, in the head's order; in float64, which finite states fit."""
        self.check_width(states_ED.shape[1])
        check_finite(np.all(np.isfinite(states_ED), axis=1))
        return states_ED.astype(np.float64) @ self.weight_CD.T.astype(np.float64) + self.bias_C

    def for_task(self, task: Task) -> Head:
        """The head in the task's order, which numbered classes (LABEL_0, ...) are taken to have."""
        names = [label.lower() for label in self.labels]
        if names == [f"label_{index}" for index in range(len(task.labels))]:
            names = list(task.labels)
        if sorted(names) != sorted(task.labels):
            classes, others = ", ".join(self.labels), ", ".join(task.labels)
            raise InputError(f"the head's classes are {classes}; {task.name} has {others}.")
        order = [names.index(label) for label in task.labels]
        return Head(self.weight_CD[order], self.bias_C[order], task.labels, self.backbone)

    def save(self, folder: Path) -> Path:
        """Write `classifier.safetensors` into a folder; returns the file."""
        about = {"labels": list(self.labels), "backbone": self.backbone}
        path = folder / FILE_NAME
        tensors = {"weight": np.ascontiguousarray(self.weight_CD), "bias": self.bias_C}
        with write_whole(path) as (staged,):
            save_file(tensors, staged, metadata={"head": json.dumps(about)})
        return path

    @classmethod
    def load(cls, folder: Path) -> Head:
        """Read what `save` wrote."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {FILE_NAME}; python -m convert.hf_to_flax --classifier makes it "
                "from a Hugging Face sequence classifier."
            )
        try:
            with safe_open(path, framework="numpy") as file:
                about = json.loads(file.metadata()["head"])
                weight_CD, bias_C = file.get_tensor("weight"), file.get_tensor("bias")
            if not isinstance(about["labels"], list):
                raise ValueError(f"its labels are {about['labels']!r}, expected a list")
            return cls(weight_CD, bias_C, tuple(about["labels"]), about["backbone"])
        except NonFiniteError as error:
            raise NonFiniteError(f"{path}: {error}") from error
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Convert again.") from error


def fit_head(
    states_ED: Float[np.ndarray, "E D"], labels_E: np.ndarray, labels: tuple[str, ...], *, l2: float
) -> tuple[Head, dict[str, Any]]:
    """Fit multinomial logistic regression on frozen states by L-BFGS, and say where it stopped.

    States are standardised channel by channel, which is folded into the head; the loss is the mean
    cross-entropy plus `l2 / 2` times the squared weights on that scale.
    """
    if not 0 <= l2 < np.inf:
        raise InputError(f"--l2 must be at least 0, got {l2}.")
    check_finite(np.all(np.isfinite(states_ED), axis=1))
    if missing := set(range(len(labels))) - set(labels_E.tolist()):
        raise InputError(f"no training row is {', '.join(labels[i] for i in sorted(missing))}.")
    mean_D, std_D = states_ED.mean(0, dtype=np.float64), states_ED.std(0, dtype=np.float64)
    std_D = np.where(std_D > 0, std_D, 1)
    x_ED, classes = (states_ED - mean_D) / std_D, len(labels)
    target_EC = np.eye(classes)[labels_E]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight_CD, bias_C = np.split(flat.reshape(classes, -1), [-1], axis=1)
        logprobs_EC = scipy.special.log_softmax(x_ED @ weight_CD.T + bias_C.T, axis=1)
        error_EC = (np.exp(logprobs_EC) - target_EC) / len(x_ED)
        gradient_CD = error_EC.T @ x_ED + l2 * weight_CD
        value = l2 / 2 * (weight_CD**2).sum() - (logprobs_EC * target_EC).sum() / len(x_ED)
        return value, np.column_stack([gradient_CD, error_EC.sum(0)]).ravel()

    start = np.zeros(classes * (x_ED.shape[1] + 1))
    options = {"maxiter": 500, "gtol": 1e-6}
    best = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    weight_CD, bias_C = np.split(best.x.reshape(classes, -1), [-1], axis=1)
    weight_CD, bias_C = weight_CD / std_D, bias_C[:, 0] - (weight_CD / std_D) @ mean_D
    head = Head(weight_CD.astype(np.float32), bias_C.astype(np.float32), labels)
    norm = float(np.linalg.norm(best.jac))
    return head, {"iterations": int(best.nit), "loss": float(best.fun), "gradient_norm": norm}
