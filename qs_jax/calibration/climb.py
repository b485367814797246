"""Search steps: measure candidates, climb, and verify the front against the dense model."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from qs_jax.calibration.families import Levels, Space
from qs_jax.calibration.scores import Scores, score_tokens, upper_bound
from qs_jax.config import GREEDY, Config, QuickSilverConfig
from qs_jax.engine.generate import generate
from qs_jax.engine.prompt_plan import runs_fast
from qs_jax.evaluation.perplexity import SAVED, exp
from qs_jax.models import Params

OBJECTIVES = ("exact_flops", "time", "paper_flops", "layer_tokens", "kv_bytes")
# Steps are tried up to this multiple of the budget. KL divergence overstates a loss of perplexity,
# by half as a rule, and the front shows what a little more would buy.
_BEYOND = 2.0
_TIMED_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Point:
    """One measured candidate: a KV policy and the levels of its knobs.

    Attributes:
      cost: What was held down: the KL divergence from the dense model, token by token, as the rise
        in perplexity it would be, dense perplexity * (exp(KL) - 1).
      saved: Shares of the dense work, by every account of `qs_jax.accounting`.
      saving: The share that was maximised.
      ppl_increase: Perplexity less the dense model's, same windows.
      agreement: Share of tokens at which both prefer the same next token.
    """

    family: str
    levels: Levels
    cost: float
    saved: dict[str, float]
    saving: float
    ppl_increase: float = math.nan
    agreement: float = math.nan


@runtime_checkable
class Candidates(Protocol):
    """A family of candidates: the preset at some levels, and the parameters it reads."""

    @property
    def policy(self) -> str: ...

    def preset(self, levels: Levels, *, lean: bool = False) -> QuickSilverConfig: ...

    def params(self, params: Params, levels: Levels, qs: QuickSilverConfig) -> Params: ...


class Task(NamedTuple):
    """Windows to score, the dense model's scores on them, and what candidates must achieve.

    Windows of several `texts` take turns.
    """

    params: Params
    cfg: Config
    tokens_WT: Int[np.ndarray, "W T"]
    dense: Scores
    max_ppl_increase: float
    objective: str
    batch_size: int
    texts: tuple[str, ...]

    def on(self, tokens_WT: Int[np.ndarray, "W T"]) -> Task:
        """The same task on other windows."""
        dense = score_tokens(self.params, tokens_WT, self.cfg, self.batch_size)
        return self._replace(tokens_WT=tokens_WT, dense=dense)


def measure(task: Task, family: Candidates, levels: Levels, qs: QuickSilverConfig) -> Scores:
    """Score the task's windows under some mechanisms."""
    cfg = task.cfg.replace(quicksilver=qs)
    params = family.params(task.params, levels, qs)
    return score_tokens(params, task.tokens_WT, cfg, task.batch_size, task.dense)


def point(task: Task, family: Candidates, levels: Levels) -> Point:
    """Measure a candidate on the task's windows."""
    qs = family.preset(levels)
    scores = measure(task, family, levels, qs)
    saved = {name: value for name, value in scores.saved.items() if isinstance(value, float)}
    saved |= {f"prompt_{n}": v for n, v in (scores.saved["prefill"] or {}).items()}
    if task.objective == "time":
        saving = time_saved(task, family, levels, qs, _TIMED_RUNS) or 0.0
    else:
        saving = saved[f"{task.objective}_saved"]
    dense = task.dense.perplexity
    cost = dense * ((exp(scores.kl) or math.inf) - 1)
    more = (scores.perplexity - dense, scores.agreement)
    return Point(family.policy, levels, cost, saved, saving, *more)


def time_saved(
    task: Task, family: Candidates, levels: Levels, qs: QuickSilverConfig, runs: int
) -> float | None:
    """Share of the dense prefill's time that a preset saves, by runs of both in turn.

    None under "teacher-forced", which has no prompts, and where no fast engine runs the preset.
    """
    greedy = task.cfg.replace(max_new_tokens=1, eos_token_ids=(), **GREEDY)
    fast = greedy.replace(quicksilver=qs, engine="auto")
    if fast.effective_protocol != "continuation" or not runs_fast(fast, generates=True):
        return None
    prompts_WT = task.tokens_WT[: task.batch_size, : -task.cfg.continuation_tokens]
    params = family.params(task.params, levels, qs)

    def seconds(cfg: Config) -> float:
        began = time.perf_counter()
        jax.block_until_ready(generate(params, prompts_WT, cfg).logprobs)
        return time.perf_counter() - began

    pairs = [(seconds(fast.replace(quicksilver=None)), seconds(fast)) for _ in range(runs + 1)]
    return 1 - median(after / before for before, after in pairs[1:])


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
                    points[steps[knob]] = point(task, space, steps[knob])
                    bar.update()
                there = points[steps[knob]]
                cost = max(there.cost - here.cost, 1e-6)
                within = there.cost <= ceiling
                gains[knob] = (there.saving - here.saving) / cost if within else -math.inf
                fresh.add(knob)
                if gains[knob] <= 0:
                    del steps[knob]
            here = points[steps[knob]]


def pareto(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points that no other beats in both saving and cost, the smallest saving first."""
    front: list[Point] = []
    lowest = math.inf
    for point in sorted(points, key=lambda p: (-p.saving, p.cost)):
        if point.saving > 0 and point.cost < lowest:
            front.append(point)
            lowest = point.cost
    return tuple(front[::-1])


def spread(front: Sequence[Point], task: Task, candidates: int) -> list[Point]:
    """Points to verify, evenly spread over the front up to the budget, the safest first."""
    within = [point for point in front if point.cost <= _BEYOND * task.max_ppl_increase]
    if len(within) <= candidates:
        return within
    at = np.linspace(0, len(within) - 1, candidates + 1).round().astype(int)[1:]
    return [within[index] for index in sorted(set(at.tolist()))]


def verify(
    task: Task,
    walk: Sequence[Point],
    spaces: Mapping[str, Any],
    confidence: float,
    *,
    also: Mapping[str, Task] | None = None,
    probe: Probe | None = None,
    variants: Sequence[QuickSilverConfig] | None = None,
    progress: bool = False,
) -> tuple[Point | None, list[dict[str, Any]]]:
    """Score candidates in order, here and on `also`, until one leaves the budget.

    A candidate also leaves it if the `probe` says that it lost a retrieval. `variants` are scored
    in place of the candidates' own presets, one each.

    Returns:
      The last one within the budget (None if the first is not), and the measures of each.
    """
    best, entries = None, []
    if variants is None:
        variants = [spaces[each.family].preset(each.levels, lean=True) for each in walk]
    pairs = list(zip(walk, variants, strict=True))
    for each, qs in tqdm(pairs, "verifying", disable=not progress):
        family = spaces[each.family]
        scores, entry = _judge(task, family, each.levels, qs, confidence)
        others = {
            name: _judge(other, family, each.levels, qs, confidence)[1]
            | {"dense_perplexity": other.dense.perplexity}
            for name, other in (also or {}).items()
        }
        within = all(judged["within_budget"] for judged in (entry, *others.values()))
        if within and probe is not None:
            params = family.params(task.params, each.levels, qs)
            entry["retrieval"] = probe(params, task.cfg.replace(quicksilver=qs), task)
            within = entry["retrieval"]["lost"] == 0
        entry |= {"family": each.family, "levels": list(each.levels), "confidence": confidence}
        entry |= {name: scores.saved[name] for name in SAVED}
        entry["prompt_exact_flops_saved"] = scores.saved["prefill"]["exact_flops_saved"]
        entry["within_budget"] = within
        entries.append(entry | ({"also": others} if others else {}))
        if not within:
            break
        best = each
    return best, entries


# Retrieval under a preset, against the dense model: measures, "lost" among them.
Probe = Callable[[Params, Config, Task], dict[str, Any]]


def _judge(
    task: Task, family: Candidates, levels: Levels, qs: QuickSilverConfig, confidence: float
) -> tuple[Scores, dict[str, Any]]:
    """Score a candidate on a task's windows, and hold its bound against the budget."""
    scores = measure(task, family, levels, qs)
    bound = upper_bound(scores, task.dense, confidence)
    entry: dict[str, Any] = {
        "ppl_increase": scores.perplexity - task.dense.perplexity,
        "upper_bound": bound if math.isfinite(bound) else None,
        "kl": scores.kl,
        "agreement": scores.agreement,
        "within_budget": bool(bound <= task.max_ppl_increase),
        "windows": len(scores.nll_W),
    }
    if (count := len(task.texts)) > 1:
        parts = [slice(at, None, count) for at in range(count)]
        pairs = [(scores.part(rows), task.dense.part(rows)) for rows in parts]
        found = [
            {"ppl_increase": now.perplexity - dense.perplexity}
            | {"dense_perplexity": dense.perplexity, "kl": now.kl}
            for now, dense in pairs
        ]
        entry["texts"] = dict(zip(task.texts, found, strict=True))
    return scores, entry
