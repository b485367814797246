"""Classification without training, by the likelihood of label words, and with a linear head.

The tokens of a label word are scored as the continuation of the prompt, so a mechanism that acts on
prompts acts on this one. A head reads the final state of the prompt's last token: the state that
the first token of a label word is predicted from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qs_jax import accounting
from qs_jax.accounting import flops
from qs_jax.config import Config, ModelConfig
from qs_jax.engine.devices import replicate
from qs_jax.evaluation.heads import Head
from qs_jax.evaluation.prompts import Prompts, word_tokens
from qs_jax.evaluation.rows import Rows, score_rows
from qs_jax.evaluation.significance import compared, measured
from qs_jax.evaluation.tasks import Task
from qs_jax.models import Params
from qs_jax.models import head as vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How scores of words are made comparable; see `zero_shot`.
NORMALIZATIONS = ("sum", "length", "pmi")


def _ignore(done: int) -> None:
    del done


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model makes of the examples of a task.

    Attributes:
      scores: By the name of each way to score, float64 `[E, C]`; the highest class is chosen.
      counts: Tally of `qs_jax.accounting`, all rows together.
    """

    scores: dict[str, Float[np.ndarray, "E C"]]
    counts: dict[str, Any]

    def predicted(self, way: str) -> Int[np.ndarray, "E"]:
        """The class of each example; the first of equals."""
        return self.scores[way].argmax(-1)


@dataclasses.dataclass(frozen=True)
class Runner:
    """A model under one configuration, and how it takes rows.

    Attributes:
      params: From `qs_jax.load`.
      cfg: Model, mechanisms and protocol.
      batch_size: Rows at a time.
      devices: Split each batch over these; None is the default device.
      advance: Called with the number of rows just done.
    """

    params: Params
    cfg: Config
    batch_size: int = 16
    devices: Sequence[jax.Device] | None = None
    advance: Callable[[int], Any] = _ignore

    def _run(self, rows: Rows, return_states: bool = False):
        params = self.params if self.devices is None else replicate(self.params, self.devices)
        options: dict[str, Any] = {"batch_size": self.batch_size, "devices": self.devices}
        batches = score_rows(params, rows, self.cfg, return_states=return_states, **options)
        for batch in batches:
            yield batch
            self.advance(len(batch.index))

    def loglikelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> tuple[Float[np.ndarray, "R"], dict[str, Any]]:
        """Log-likelihood of each continuation after its prompt, in nats, and the tally.

        Args:
          pairs: Token ids of prompt and continuation; either may differ in length from row to row.
        """
        rows = Rows.of(pairs)
        found = np.zeros(len(pairs))
        counts = None
        for batch in self._run(rows):
            for row, index in enumerate(batch.index):
                scored = batch.out.logprobs[row, rows.prompts[index] : len(rows.rows[index])]
                found[index] = scored.sum(dtype=np.float64)
            counts = batch.counts if counts is None else accounting.add(counts, batch.counts)
        assert counts is not None
        return found, counts

    def last_states(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[Float[np.ndarray, "E D"], dict[str, Any]]:
        """Normed final state of each prompt's last token, float32, and the tally of the prompts.

        One more token stands after each prompt, so that the mechanisms see it as a whole, as a
        prefill does; no state depends on it, and it is not counted.
        """
        after = self.cfg.model.pad_token_id or 0
        rows = Rows.of([(prompt, [after]) for prompt in prompts])
        states = np.zeros((len(prompts), self.cfg.model.hidden_size), np.float32)
        counts = None
        for batch in self._run(rows, return_states=True):
            assert batch.out.states is not None
            for row, index in enumerate(batch.index):
                states[index] = batch.out.states[row, rows.prompts[index] - 1]
            counts = batch.counts if counts is None else accounting.add(counts, batch.counts)
        assert counts is not None
        counts["decode"] = jax.tree.map(lambda value: 0 * value, counts["decode"])
        return states, counts


def zero_shot(
    runner: Runner, task: Task, prompts: Prompts, tokenizer: PreTrainedTokenizerBase
) -> Outcome:
    """Score every class of every example by the likelihood of its word.

    "sum" is log p(word | prompt), in nats: the default, because it is the model's own answer and
    what published accuracies use. "length" divides it by the word's tokens; the words of the tasks
    here have one each in most vocabularies. "pmi" subtracts log p(word | end of the prompt), the
    word's score before the example is known (domain-conditional PMI, Holtzman et al. 2021): it
    takes away a preference for a word, and depends on what is called the end of the prompt.

    Raises:
      InputError: A word has no tokens, or two have the same.
    """
    words = word_tokens(task, tokenizer)
    domain = list(tokenizer(task.domain, verbose=False).input_ids)
    quiet = dataclasses.replace(runner, advance=_ignore)
    sums_EC, counts = word_loglikelihoods(runner, prompts.rows, words)
    alone_1C, _ = word_loglikelihoods(quiet, [domain], words)
    lengths_C = np.array([len(word) for word in words])
    scores = {"sum": sums_EC, "length": sums_EC / lengths_C, "pmi": sums_EC - alone_1C}
    return Outcome(scores, counts)


def word_loglikelihoods(
    runner: Runner, prompts: Sequence[Sequence[int]], words: Sequence[Sequence[int]]
) -> tuple[Float[np.ndarray, "E C"], dict[str, Any]]:
    """Log-likelihood of every word after every prompt, in nats, and the tally.

    Words of one token each are read from one run of the prompt; others take a run for each word.
    """
    if any(len(word) > 1 for word in words):
        pairs = [(row, word) for row in prompts for word in words]
        flat_R, counts = runner.loglikelihoods(pairs)
        return flat_R.reshape(len(prompts), len(words)), counts
    states_ED, counts = runner.last_states(prompts)
    ids_C = jnp.asarray([word[0] for word in words])
    states_1ED = jnp.asarray(states_ED, runner.cfg.model.dtype)[None]
    found_1EC = _next_logprobs(runner.params, states_1ED, ids_C)
    return np.asarray(found_1EC[0], np.float64), counts


@jax.jit
def _next_logprobs(params: Params, h_BTD: Array, ids_C: Array) -> Array:
    """Log-probability of each id after each state, `[B, T, C]`."""

    def chunk(h_BCD: Array) -> Array:
        logits_BCV = vocabulary.logits(params, h_BCD)
        return logits_BCV[..., ids_C] - jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)

    return vocabulary.map_positions(chunk, vocabulary.head_table(params).shape[0], h_BTD)


def with_head(runner: Runner, prompts: Prompts, head: Head) -> Outcome:
    """Score every class of every example by a linear head, its classes in the task's order."""
    states_ED, counts = runner.last_states(prompts.rows)
    classes = len(head.labels)
    return Outcome(
        {"head": head.logits(states_ED).astype(np.float64)},
        _read_by_head(counts, runner.cfg.model, classes),
    )


def _read_by_head(counts: dict[str, Any], model: ModelConfig, classes: int) -> dict[str, Any]:
    """The tally with the vocabulary's head, which did not have to run, replaced by C classes."""
    prefill = dict(counts["prefill"])
    change = prefill["readouts"] * (2 * model.hidden_size * classes - flops.head_flops(model))
    for name in ("exact_flops", "exact_flops_dense"):
        prefill[name] += change
    return counts | {"prefill": prefill}


def task_results(
    task: Task, labels_E: Int[np.ndarray, "E"], dense: Outcome, other: Outcome | None, way: str
) -> dict[str, Any]:
    """What the dense model and a preset make of the same examples, as plain JSON types.

    Args:
      task: Names the metric.
      labels_E: Class of each example.
      dense: Of the dense model.
      other: Of the preset; None where it is off.
      way: The way to score that decides; the others' values stand under "ways".
    """
    share = np.bincount(labels_E, minlength=len(task.labels)) / len(labels_E)
    out: dict[str, Any] = {
        "metric": task.metric,
        "examples": len(labels_E),
        "class_shares": dict(zip(task.labels, share.tolist(), strict=True)),
        "dense": _one(task, labels_E, dense, way),
    }
    columns = {"label": labels_E.tolist(), "dense": _columns(dense)}
    if other is not None:
        summary = accounting.summary(other.counts)
        out["quicksilver"] = _one(task, labels_E, other, way) | {"saved": summary}
        predictions = dense.predicted(way), other.predicted(way)
        out["difference"] = compared(task.metric, labels_E, *predictions)
        columns["quicksilver"] = _columns(other)
    return out | {"per_example": columns}


def _one(task: Task, labels_E: np.ndarray, outcome: Outcome, way: str) -> dict[str, Any]:
    ways = {
        name: measured(task.metric, labels_E, outcome.predicted(name)) for name in outcome.scores
    }
    return ways[way] | {"ways": ways}


def _columns(outcome: Outcome) -> dict[str, Any]:
    return {name: scores.round(6).tolist() for name, scores in outcome.scores.items()}
