"""Search steps: measure candidates, climb, and verify the front against the dense model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from qs_jax import accounting
from qs_jax.calibration.families import Levels, Space
from qs_jax.config import Config, QuickSilverConfig
from qs_jax.evaluation.perplexity import SAVED, check_width, exp, per_window_nll, total_counts
from qs_jax.evaluation.rows import score_rows
from qs_jax.mechanisms.kv_maps import select
from qs_jax.models import Params, head

OBJECTIVES = ("exact_flops", "paper_flops", "layer_tokens")
# Steps are tried up to this multiple of the budget: the front shows what a little more would buy.
_BEYOND = 1.5


@dataclasses.dataclass(frozen=True)
class Scores:
    """One configuration on some windows, each with N scored tokens.

    Attributes:
      nll_W: Mean negative log-likelihood of a window's scored tokens, in nats.
      tokens_W: Their number.
      saved: Shares of the dense work, by every account of `qs_jax.accounting`.
      states_WND: What the head reads before each; of the dense model only.
      kl_W: Mean KL divergence from the dense model, in nats; zeros for itself.
      agreement: Share of tokens at which both prefer the same next token.
    """

    nll_W: Float[np.ndarray, "W"]
    tokens_W: Int[np.ndarray, "W"]
    saved: dict[str, Any]
    states_WND: Any = None
    kl_W: Any = None
    agreement: float = 1.0

    @property
    def perplexity(self) -> float:
        """Of all tokens together; infinite beyond float64."""
        nll = (self.nll_W * self.tokens_W).sum() / self.tokens_W.sum()
        return exp(float(nll)) or math.inf

    @property
    def kl(self) -> float:
        """Mean KL divergence from the dense model over all tokens, in nats."""
        return 0.0 if self.kl_W is None else float(self.kl_W.mean())


def score_tokens(
    params: Params,
    tokens_WT: Int[np.ndarray, "W T"],
    cfg: Config,
    batch_size: int,
    dense: Scores | None = None,
) -> Scores:
    """Score windows under a configuration, `batch_size` at a time, against the dense model's."""
    width = tokens_WT.shape[1]
    check_width(width, cfg)
    prompt = width - cfg.continuation_tokens if cfg.effective_protocol == "continuation" else 0
    pairs = [(row[:prompt], row[prompt:]) for row in tokens_WT.tolist()]
    first, entries, states, apart = max(prompt, 1) - 1, [], [], []
    for batch in score_rows(params, pairs, cfg, batch_size=batch_size, return_states=True):
        read_BND = batch.out.states[:, first : width - 1]
        if dense is None:
            states.append(np.asarray(read_BND))
        else:
            both = (read_BND, dense.states_WND[np.asarray(batch.index)])
            apart.append(jax.device_get(_compare(params, *both)))
        nll_B = -batch.out.logprobs.sum(axis=1, dtype=np.float64)
        tokens_B = batch.out.mask.sum(axis=1)
        entries.append({"nll": nll_B.tolist(), "tokens": tokens_B.tolist(), "counts": batch.counts})
    found = (*per_window_nll(entries), accounting.summary(total_counts(entries)))
    if dense is None:
        return Scores(*found, states_WND=np.concatenate(states))
    kl_WN, same_WN = (np.concatenate(part) for part in zip(*apart, strict=True))
    return Scores(*found, kl_W=kl_WN.mean(1, dtype=np.float64), agreement=float(same_WN.mean()))


@jax.jit
def _compare(params: Params, h_BND: Array, dense_BND: Array) -> tuple[Array, Array]:
    """KL divergence from the dense model, in nats, and whether both prefer the same token."""

    def compare(h_BCD: Array, dense_BCD: Array) -> Array:
        now, dense = (head.logits(params, x) for x in (h_BCD, dense_BCD))
        now, dense = jax.nn.log_softmax(now), jax.nn.log_softmax(dense)
        kl_BC = (jnp.exp(dense) * (dense - now)).sum(-1)
        same_BC = now.argmax(-1) == dense.argmax(-1)
        return jnp.stack([kl_BC, same_BC.astype(kl_BC.dtype)], axis=-1)

    vocab = head.head_table(params).shape[0]
    both_BN2 = head.map_positions(compare, 2 * vocab, h_BND, dense_BND)
    return both_BN2[..., 0], both_BN2[..., 1]


def upper_bound(scores: Scores, dense: Scores, confidence: float) -> float:
    """One-sided confidence bound on the perplexity increase, windows being the sample.

    A Student-t bound on the mean difference in negative log-likelihood, window by window (what
    makes a window hard for both plays no part), as perplexity. It is infinite for a single window.
    """
    from scipy.stats import sem, t

    change_W = (scores.nll_W - dense.nll_W) * dense.tokens_W / dense.tokens_W.mean()
    count = len(change_W)
    if count < 2:
        return math.inf
    highest = change_W.mean() + float(t.ppf(confidence, count - 1)) * sem(change_W)
    return dense.perplexity * ((exp(float(highest)) or math.inf) - 1)


@dataclasses.dataclass(frozen=True)
class Point:
    """One measured candidate: a KV policy and the levels of its knobs.

    Attributes:
      ppl_increase: Perplexity less the dense model's, same windows.
      saved: Shares of the dense work, by every account of `qs_jax.accounting`.
      saving: The share that was maximised.
    """

    family: str
    levels: Levels
    ppl_increase: float
    saved: dict[str, float]
    saving: float


class Task(NamedTuple):
    """Windows to score, the dense model's scores on them, and what candidates must achieve."""

    params: Params
    cfg: Config
    tokens_WT: Int[np.ndarray, "W T"]
    dense: Scores
    max_ppl_increase: float
    objective: str
    batch_size: int

    def on(self, tokens_WT: Int[np.ndarray, "W T"]) -> Task:
        """The same task on other windows."""
        dense = score_tokens(self.params, tokens_WT, self.cfg, self.batch_size)
        return self._replace(tokens_WT=tokens_WT, dense=dense)


def params_for(task: Task, qs: QuickSilverConfig) -> Params:
    """The parameters with the maps these mechanisms read, and no others."""
    params = {name: value for name, value in task.params.items() if name != "kv_maps"}
    if qs.kv_skip is not None and qs.kv_skip.policy == "extrapolate":
        assert qs.halting is not None
        params["kv_maps"] = select(task.params["kv_maps"], qs.halting.layers or ())
    return params


def measure(task: Task, qs: QuickSilverConfig) -> Scores:
    """Score the task's windows under some mechanisms."""
    cfg = task.cfg.replace(quicksilver=qs)
    return score_tokens(params_for(task, qs), task.tokens_WT, cfg, task.batch_size)


def _point(task: Task, space: Space, levels: Levels) -> Point:
    scores = measure(task, space.preset(levels))
    saved = {name: value for name, value in scores.saved.items() if isinstance(value, float)}
    increase = scores.perplexity - task.dense.perplexity
    return Point(space.policy, levels, increase, saved, saved[f"{task.objective}_saved"])


def climb(task: Task, space: Space, max_evaluations: int, *, progress: bool = False) -> list[Point]:
    """Lazy greedy ascent from the dense model; returns every candidate that was measured.

    A step gains what it saves for each unit of perplexity it costs; one that costs nothing, what it
    saves. Gains of earlier rounds order the knobs, and only a knob that leads is measured anew. A
    step that leaves the budget far behind ends its knob.
    """
    here, ceiling = Point(space.policy, space.start, 0.0, {}, 0.0), _BEYOND * task.max_ppl_increase
    points: dict[Levels, Point] = {}
    gains = dict.fromkeys(range(len(space.start)), math.inf)  # of each knob, as last measured
    title = f"searching, {space.policy}"
    with tqdm(total=max_evaluations, desc=title, disable=not progress) as bar:
        while True:
            steps = {knob: to for knob, to in space.steps(here.levels) if gains[knob] > -math.inf}
            fresh: set[int] = set()
            while (knob := max(steps, key=gains.__getitem__, default=None)) not in fresh:
                if knob is None:
                    return list(points.values())
                if steps[knob] not in points:
                    if len(points) == max_evaluations:
                        return list(points.values())
                    points[steps[knob]] = _point(task, space, steps[knob])
                    bar.update()
                point = points[steps[knob]]
                cost = max(point.ppl_increase - here.ppl_increase, 1e-6)
                within = point.ppl_increase <= ceiling
                gains[knob] = (point.saving - here.saving) / cost if within else -math.inf
                fresh.add(knob)
                if gains[knob] <= 0:
                    del steps[knob]
            here = points[steps[knob]]


def pareto(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points that no other beats in both saving and perplexity, the smallest saving first."""
    front: list[Point] = []
    lowest = math.inf
    for point in sorted(points, key=lambda p: (-p.saving, p.ppl_increase)):
        if point.saving > 0 and point.ppl_increase < lowest:
            front.append(point)
            lowest = point.ppl_increase
    return tuple(front[::-1])


def spread(front: Sequence[Point], task: Task, candidates: int) -> list[Point]:
    """Points to verify, evenly spread over the front up to the budget, the safest first."""
    within = [point for point in front if point.ppl_increase <= task.max_ppl_increase]
    if len(within) <= candidates:
        return within
    at = np.linspace(0, len(within) - 1, candidates + 1).round().astype(int)[1:]
    return [within[index] for index in sorted(set(at.tolist()))]


def verify(
    task: Task,
    walk: Sequence[Point],
    spaces: Mapping[str, Space],
    confidence: float,
    *,
    also: Mapping[str, Task] | None = None,
    progress: bool = False,
) -> tuple[Point | None, list[dict[str, Any]]]:
    """Score candidates in order, here and on `also`, until one's bound leaves the budget.

    Returns:
      The last one within the budget (None if the first is not), and the measures of each.
    """
    best, entries = None, []
    for point in tqdm(walk, "verifying", disable=not progress):
        qs = spaces[point.family].preset(point.levels, lean=True)
        scores, entry = _judge(task, qs, confidence)
        others = {
            name: _judge(other, qs, confidence)[1] | {"dense_perplexity": other.dense.perplexity}
            for name, other in (also or {}).items()
        }
        within = all(each["within_budget"] for each in (entry, *others.values()))
        entry |= {"family": point.family, "levels": list(point.levels), "confidence": confidence}
        entry |= {name: scores.saved[name] for name in SAVED}
        entry["prompt_exact_flops_saved"] = scores.saved["prefill"]["exact_flops_saved"]
        entry["within_budget"] = within
        entries.append(entry | ({"also": others} if others else {}))
        if not within:
            break
        best = point
    return best, entries


def _judge(task: Task, qs: QuickSilverConfig, confidence: float) -> tuple[Scores, dict[str, Any]]:
    """Score a candidate on a task's windows, and hold its bound against the budget."""
    scores = measure(task, qs)
    bound = upper_bound(scores, task.dense, confidence)
    return scores, {
        "ppl_increase": scores.perplexity - task.dense.perplexity,
        "upper_bound": bound if math.isfinite(bound) else None,
        "within_budget": bool(bound <= task.max_ppl_increase),
        "windows": len(scores.nll_W),
    }
