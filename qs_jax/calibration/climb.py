"""The search itself: candidates measured one by one, and how much worse they are than dense."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from qs_jax import accounting
from qs_jax.calibration.families import Levels, Space
from qs_jax.config import Config, QuickSilverConfig
from qs_jax.evaluation.perplexity import (
    SAVED,
    cut_windows,
    exp,
    per_window_nll,
    score_windows,
    total_counts,
)
from qs_jax.mechanisms.kv_maps import select
from qs_jax.models import Params

OBJECTIVES = ("exact_flops", "paper_flops", "layer_tokens")
# Steps are tried up to this multiple of the budget: the front shows what a little more would buy.
_BEYOND = 1.5
_TINY = 1e-6


@dataclasses.dataclass(frozen=True)
class Scores:
    """One configuration on some windows.

    Attributes:
      nll_W: Mean negative log-likelihood of each window's scored tokens, in nats.
      tokens_W: How many those are.
      saved: Shares saved, from `qs_jax.accounting.summary`.
    """

    nll_W: Float[np.ndarray, "W"]
    tokens_W: Int[np.ndarray, "W"]
    saved: dict[str, Any]

    @property
    def nll(self) -> float:
        """Of all tokens together."""
        return float((self.nll_W * self.tokens_W).sum() / self.tokens_W.sum())

    @property
    def perplexity(self) -> float:
        """Exp of `nll`; infinite beyond float64."""
        return exp(self.nll) or math.inf

    def saving(self, objective: str) -> float:
        """Share of the dense work saved, by one of `OBJECTIVES`."""
        return float(self.saved[f"{objective}_saved"])


def score_tokens(
    params: Params, tokens_WT: Int[np.ndarray, "W T"], cfg: Config, batch_size: int
) -> Scores:
    """Score windows under a configuration.

    Args:
      params: From `qs_jax.load`.
      tokens_WT: Windows.
      cfg: Mechanisms, protocol and engine.
      batch_size: Windows at a time.
    """
    windows = cut_windows(tokens_WT.reshape(-1).tolist(), tokens_WT.shape[1])
    entries = list(score_windows(params, windows, cfg, batch_size=batch_size))
    return Scores(*per_window_nll(entries), accounting.summary(total_counts(entries)))


def ppl_increase(scores: Scores, dense: Scores) -> float:
    """Perplexity less that of the dense model."""
    return scores.perplexity - dense.perplexity


def upper_bound(scores: Scores, dense: Scores, confidence: float) -> float:
    """One-sided confidence bound on the perplexity increase, windows being the sample.

    The differences in mean negative log-likelihood, window by window, are taken as a sample of a
    Student-t mean: what makes a window hard for both plays no part. The dense perplexity that turns
    the bound into perplexity is that of these windows.

    Args:
      scores: Of the mechanisms.
      dense: Of the same windows.
      confidence: Between 0 and 1.

    Returns:
      The bound; infinite for a single window.
    """
    from scipy.stats import t

    change_W = (scores.nll_W - dense.nll_W) * dense.tokens_W / dense.tokens_W.mean()
    count = len(change_W)
    if count < 2:
        return math.inf
    error = change_W.std(ddof=1) / math.sqrt(count)
    highest = change_W.mean() + float(t.ppf(confidence, count - 1)) * error
    grown = exp(float(highest)) or math.inf
    return dense.perplexity * (grown - 1)


@dataclasses.dataclass(frozen=True)
class Point:
    """One measured candidate.

    Attributes:
      family: Of `Space.name`.
      levels: Of its knobs.
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
    """What stays the same through a search.

    Attributes:
      params: With all maps there are.
      cfg: Protocol and engine; mechanisms are put in.
      tokens_WT: Windows scored.
      dense: The dense model on them.
      max_ppl_increase: The budget.
      objective: One of `OBJECTIVES`.
      batch_size: Windows at a time.
    """

    params: Params
    cfg: Config
    tokens_WT: Int[np.ndarray, "W T"]
    dense: Scores
    max_ppl_increase: float
    objective: str
    batch_size: int


def params_for(task: Task, qs: QuickSilverConfig) -> Params:
    """The parameters with the maps these mechanisms read, and no others."""
    maps = task.params.get("kv_maps")
    kept = {name: value for name, value in task.params.items() if name != "kv_maps"}
    if maps is None or qs.kv_skip is None or qs.kv_skip.policy != "extrapolate":
        return kept
    assert qs.halting is not None
    assert qs.halting.layers is not None
    return {**kept, "kv_maps": select(maps, qs.halting.layers)}


def measure(task: Task, qs: QuickSilverConfig) -> Scores:
    """Score the task's windows under some mechanisms."""
    cfg = task.cfg.replace(quicksilver=qs)
    return score_tokens(params_for(task, qs), task.tokens_WT, cfg, task.batch_size)


def _point(task: Task, space: Space, levels: Levels) -> Point:
    scores = measure(task, space.preset(levels))
    saved = {name: value for name, value in scores.saved.items() if isinstance(value, float)}
    increase = ppl_increase(scores, task.dense)
    return Point(space.name, levels, increase, saved, scores.saving(task.objective))


def climb(task: Task, space: Space, max_evaluations: int, *, progress: bool = False) -> list[Point]:
    """Lazy greedy ascent from the dense model; every candidate that was measured.

    A step counts by what it saves for each unit of perplexity it costs; one that costs nothing, by
    what it saves. A step that leaves the budget far behind ends its knob.
    """
    here = Point(space.name, space.start, 0.0, {}, 0.0)
    found: dict[Levels, Point] = {}
    last: dict[int, float] = {}  # each knob's gain when it was last measured
    with tqdm(total=max_evaluations, desc=f"searching, {space.name}", disable=not progress) as bar:

        def measured(levels: Levels) -> Point | None:
            if levels not in found:
                if len(found) == max_evaluations:
                    return None
                point = found[levels] = _point(task, space, levels)
                bar.set_postfix_str(f"+{point.ppl_increase:.3f} for {point.saving:.1%}", False)
                bar.update()
            return found[levels]

        closed: set[int] = set()
        while True:
            steps = {knob: to for knob, to in space.steps(here.levels) if knob not in closed}
            best = _best_step(here, steps, last, measured, _BEYOND * task.max_ppl_increase, closed)
            if best is None:
                return list(found.values())
            here = best


def _best_step(
    here: Point,
    steps: Mapping[int, Levels],
    last: dict[int, float],
    measured: Callable[[Levels], Point | None],
    ceiling: float,
    closed: set[int],
) -> Point | None:
    """The step that gains most, measuring only what may be it; None if none gains.

    Args:
      here: Where the steps start.
      steps: Levels after a step of each knob.
      last: Gains as last measured; updated.
      measured: Measures levels, or returns None when no more may be measured.
      ceiling: A step to a larger perplexity increase ends its knob.
      closed: Knobs that have ended; updated.
    """
    queue = [(-last.get(knob, math.inf), knob) for knob in steps]
    heapq.heapify(queue)
    fresh: dict[int, Point] = {}
    while queue:
        _, knob = heapq.heappop(queue)
        if knob in fresh:
            return fresh[knob]
        point = measured(steps[knob])
        if point is None:
            return None
        if point.ppl_increase > ceiling:
            closed.add(knob)
            continue
        cost = max(point.ppl_increase - here.ppl_increase, _TINY)
        last[knob] = (point.saving - here.saving) / cost
        if last[knob] > 0:
            fresh[knob] = point
            heapq.heappush(queue, (-last[knob], knob))
    return None


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
    spaces: dict[str, Space],
    confidence: float,
    *,
    also: Mapping[str, Task] | None = None,
    progress: bool = False,
) -> tuple[Point | None, list[dict[str, Any]]]:
    """Score candidates on the task's windows in order, until one's bound leaves the budget.

    Args:
      task: Windows to verify on.
      walk: Candidates, the safest first.
      spaces: What their levels stand for.
      confidence: Of each bound.
      also: Other texts, by name, on which the bound must stay within the budget too.
      progress: Show a progress bar.

    Returns:
      The last one within the budget (None if the first is not), and what was measured of each.
    """
    best, told = None, []
    for point in tqdm(walk, "verifying", disable=not progress):
        qs = spaces[point.family].preset(point.levels, lean=True)
        scores, judged = _judge(task, qs, confidence)
        others = {}
        for name, other in (also or {}).items():
            found = _judge(other, qs, confidence)[1]
            others[name] = found | {"dense_perplexity": other.dense.perplexity}
        kept = all(each["within_budget"] for each in (judged, *others.values()))
        entry = {"family": point.family, "levels": list(point.levels), "confidence": confidence}
        entry |= judged | {"within_budget": kept}
        entry |= {name: scores.saved[name] for name in SAVED}
        entry["prompt_exact_flops_saved"] = scores.saved["prefill"]["exact_flops_saved"]
        told.append(entry | ({"also": others} if others else {}))
        if not kept:
            break
        best = point
    return best, told


def _judge(task: Task, qs: QuickSilverConfig, confidence: float) -> tuple[Scores, dict[str, Any]]:
    """Score a candidate on a task's windows, and hold its bound against the budget."""
    scores = measure(task, qs)
    bound = upper_bound(scores, task.dense, confidence)
    return scores, {
        "ppl_increase": ppl_increase(scores, task.dense),
        "upper_bound": bound if math.isfinite(bound) else None,
        "within_budget": bool(bound <= task.max_ppl_increase),
        "windows": len(scores.nll_W),
    }
