"""GLUE and SuperGLUE without training, by lm-evaluation-harness: its prompts, words and metrics."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qs_jax.evaluation.classification import Outcome, task_results

# Before the harness itself: it says which extra is missing.
from qs_jax.evaluation.lm_eval_adapter import QSJaxLM  # isort: split

import lm_eval.tasks
from datasets import Dataset

from qs_jax.evaluation.tasks import TASKS, Examples, Task


def measure_words(
    settings: dict[str, Any], mechanisms: dict[str, Any] | None, examples: Mapping[str, Examples]
) -> dict[str, dict[str, Any]]:
    """`task_results` of each task by the label words, with what the harness says of the dense run.

    Args:
      settings: Arguments of `QSJaxLM` for the dense model.
      mechanisms: Arguments to add for the preset; None measures the dense model alone.
      examples: Of each task.
    """
    dense = _run_harness(settings, examples)
    other = {} if mechanisms is None else _run_harness(settings | mechanisms, examples)
    results = {}
    for name, (outcome, about) in dense.items():
        preset = other[name][0] if other else None
        results[name] = about | task_results(TASKS[name], examples[name], outcome, preset)
    return results


def _run_harness(
    settings: dict[str, Any], examples: Mapping[str, Examples]
) -> dict[str, tuple[Outcome, dict[str, Any]]]:
    model = QSJaxLM.create_from_arg_obj(settings)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    shipped = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(
        include_path=[shipped / "glue", shipped / "super_glue"], include_defaults=False
    )
    return {
        name: _run_task(model, manager, TASKS[name], sample) for name, sample in examples.items()
    }


def _run_task(
    model: Any, manager: lm_eval.tasks.TaskManager, task: Task, examples: Examples
) -> tuple[Outcome, dict[str, Any]]:
    vars(model).update(counts=None, truncated=0)
    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its arguments from checkers
    harness_task = _harness_task(manager, task, examples)
    report = evaluate(model, tasks=[harness_task], task_manager=manager, bootstrap_iters=0)
    samples = sorted(report["samples"][task.name], key=lambda sample: sample["doc_id"])
    scores = [[value for value, _ in sample["filtered_resps"]] for sample in samples]
    lengths = [len(model.tok_encode(sample["arguments"][0][0])) for sample in samples]
    results = report["results"][task.name]
    return Outcome(np.array(scores, np.float64), model.counts), {
        "version": report["versions"][task.name],
        "metrics": {name: results[name] for name in ("acc,none", "mcc,none") if name in results},
        "truncated": model.truncated,
        "mean_prompt_tokens": float(np.mean(lengths)),
    }


def _harness_task(manager: lm_eval.tasks.TaskManager, task: Task, examples: Examples) -> Any:
    """The harness's own task of that name, on these rows instead of the hub's."""
    rows = [
        {name: fields[names[0]] for names in task.fields for name in names} | {"label": label}
        for fields, label in zip(examples.fields, examples.labels_E.tolist(), strict=True)
    ]
    changes: dict[str, Any] = {"task": task.name, "training_split": None}
    changes["custom_dataset"] = lambda **_: {"validation": Dataset.from_list(rows)}
    changes["validation_split"] = "validation"
    # Members of a group may change what the registered task says; tasks given alone may not.
    return manager.load({"group": "local", "task": [changes]})["tasks"][task.name]
