"""Metrics of predicted classes, with intervals: alone, and paired between two models.

Accuracy has Wilson's score interval. The Matthews correlation and all differences have percentile
bootstrap intervals over examples (Efron 1979); differences are paired, so what makes an example
hard for both plays no part. McNemar's test is the exact one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 9999
_SEED = 0
# Resamples at a time: memory is this many times the number of examples.
_BATCH = 512


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
