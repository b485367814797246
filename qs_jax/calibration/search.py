"""Find the preset that saves most within a quality budget, and check it on other text.

1. *Observe*: percentiles of the signals on the calibration windows.
2. *Climb*: from the dense model, one step of one knob at a time, the step that saves most for the
   perplexity it costs. Gains are kept from earlier rounds and only the best is measured anew (lazy
   greedy search, Minoux 1978): a step seldom becomes better when others have been taken.
3. *Verify*: candidates of the front, the safest first, are scored on disjoint windows; the last one
   whose upper confidence bound stays within the budget wins, and the first that fails ends the
   walk. Testing in an order fixed beforehand needs no correction for having tested several (fixed
   sequence testing; Angelopoulos et al. 2021, "Learn then Test").
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from qs_jax import presets
from qs_jax.calibration.climb import (
    OBJECTIVES,
    Point,
    Task,
    climb,
    params_for,
    pareto,
    score_tokens,
    spread,
    verify,
)
from qs_jax.calibration.families import Space, halting_layers
from qs_jax.calibration.observe import Observed, observe
from qs_jax.config import Config, ModelConfig, QuickSilverConfig
from qs_jax.engine import inputs
from qs_jax.engine.generate import generate
from qs_jax.engine.score import score
from qs_jax.engine.weights import check_params
from qs_jax.errors import ConfigError, InputError
from qs_jax.evaluation.journal import write_json
from qs_jax.mechanisms.kv_maps import KVMaps
from qs_jax.mechanisms.shipped_maps import maps_path
from qs_jax.models import Params


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a search found.

    Attributes:
      preset: Within the budget on the verification windows; `off` if nothing is. Its provenance
        says what it was calibrated on and, under "verified", what was measured.
      params: Those of the call, with the maps the preset reads and no others.
      points: All candidates measured on the calibration windows.
      front: Those of them that none beats in both.
      verified: What was measured of each candidate of the walk on the verification windows.
      observed: Percentiles of the signals.
    """

    preset: QuickSilverConfig
    params: Params
    points: tuple[Point, ...]
    front: tuple[Point, ...]
    verified: tuple[dict[str, Any], ...]
    observed: Observed

    @property
    def maps(self) -> KVMaps | None:
        """Maps the preset reads, to be saved beside it; None if it reads none."""
        return self.params.get("kv_maps")

    def save(self, path: Path, model: ModelConfig) -> list[Path]:
        """Write the preset as FILE.json and what belongs to it beside it.

        FILE.search.json holds everything that was measured, FILE.kv_maps.safetensors the maps that
        the preset reads, if it reads any.

        Returns:
          The files, the preset first.
        """
        searched = path.with_name(f"{path.stem}.search.json")
        write_json(searched, self.to_dict())
        files = [presets.save(path, self.preset, model), searched]
        return files if self.maps is None else [*files, self.maps.save(maps_path(path))]

    def to_dict(self) -> dict[str, Any]:
        """The whole search as plain JSON types."""
        return {
            "preset": self.preset.to_dict(),
            "points": [dataclasses.asdict(point) for point in self.points],
            "front": [dataclasses.asdict(point) for point in self.front],
            "verified": list(self.verified),
            "observed": self.observed.to_dict(),
        }


def search(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    *,
    max_ppl_increase: float,
    objective: str = "exact_flops",
    confidence: float = 0.95,
    verify_share: float = 0.5,
    also: Mapping[str, inputs.TokensLike] | None = None,
    policies: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    fusion: bool = True,
    max_evaluations: int = 60,
    candidates: int = 4,
    batch_size: int = 4,
    data: str = "",
    timed_runs: int = 3,
    progress: bool = False,
) -> Calibration:
    """Search over all mechanisms together.

    Args:
      params: From `qs_jax.load`; with "kv_maps", fitted on other text, "extrapolate" is a choice.
      tokens: Windows of one length, `[W, T]`; the last `verify_share` of them verify.
      cfg: Model and protocol: under "continuation" (the default here) mechanisms act on the first
        T - `continuation_tokens` tokens of each window and the others are scored.
      max_ppl_increase: The budget, in perplexity.
      objective: What to maximise: "exact_flops", "paper_flops" or "layer_tokens" saved. Bits are
        tried for "paper_flops" only: the other two do not fall with them.
      confidence: Of the bound that must stay within the budget.
      verify_share: Share of the windows that is kept for verifying.
      also: Windows of other texts, by name, as long as those of `tokens`: a preset must stay within
        the budget on each of them, too.
      policies: KV policies to try; by default "skip" and, where there are maps, "extrapolate".
      layers: Where tokens may halt; by default eight layers from 0.4 of the depth on. With
        "extrapolate", those of the maps.
      fusion: Try fusing.
      max_evaluations: Candidates measured for each policy.
      candidates: Of the front, to be verified.
      batch_size: Windows at a time.
      data: Name of the data, for the provenance.
      timed_runs: Runs of the winner and of the dense model, in turn, for the measured time; 0 for
        none.
      progress: Show progress bars.

    Raises:
      ConfigError: A setting is out of range or does not fit the model or the maps.
      InputError: Too few windows, windows too short for the protocol, or rows of several lengths.
    """
    _check_budget(max_ppl_increase, objective)
    for name, value in (("confidence", confidence), ("verify_share", verify_share)):
        if not 0 < value < 1:
            raise ConfigError(f"{name} must be between 0 and 1, got {value}.")
    for name, count in (("max_evaluations", max_evaluations), ("candidates", candidates)):
        if count < 1:
            raise ConfigError(f"{name} must be at least 1, got {count}.")
    check_params(params, cfg.model)
    cfg = cfg if cfg.protocol is not None else cfg.replace(protocol="continuation")
    cfg = cfg.replace(quicksilver=None, engine="masked")
    calibrating_WT, verifying_WT = split(tokens, cfg, verify_share)
    observed = observe(params, calibrating_WT, cfg.model, batch_size=batch_size, progress=progress)
    dense = score_tokens(params, calibrating_WT, cfg, batch_size)
    task = Task(params, cfg, calibrating_WT, dense, float(max_ppl_increase), objective, batch_size)
    points: list[Point] = []
    spaces = {}
    if policies is None:
        policies = ("skip", "extrapolate") if params.get("kv_maps") is not None else ("skip",)
    for policy in policies:
        space = _space(policy, task, observed, layers, fusion)
        spaces[space.name] = space
        points += climb(task, space, max_evaluations, progress=progress)
    front = pareto(points)
    walk = spread(front, task, candidates)
    verifier = task._replace(
        tokens_WT=verifying_WT,
        dense=score_tokens(params, verifying_WT, cfg, batch_size),
    )
    others = {}
    for name, more in (also or {}).items():
        windows_WT = np.concatenate(split(more, cfg, 0.5))  # all of them verify
        scored = score_tokens(params, windows_WT, cfg, batch_size)
        others[name] = task._replace(tokens_WT=windows_WT, dense=scored)
    best, told = verify(verifier, walk, spaces, confidence, also=others, progress=progress)
    return _result(verifier, best, told, spaces, points, front, observed, data, timed_runs)


def calibrate(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    *,
    max_ppl_increase: float,
    **settings: Any,
) -> QuickSilverConfig:
    """The preset that saves most within a quality budget: `search(...).preset`, arguments as there.

    Its provenance holds what was measured on windows it was not chosen on; it is `off` if nothing
    fits the budget.
    """
    return search(params, tokens, cfg, max_ppl_increase=max_ppl_increase, **settings).preset


def _check_budget(max_ppl_increase: float, objective: str) -> None:
    if not (math.isfinite(max_ppl_increase) and max_ppl_increase > 0):
        raise ConfigError(
            f"max_ppl_increase must be positive, got {max_ppl_increase}: no mechanism is free, so "
            "a budget of 0 leaves the dense model."
        )
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective must be one of {OBJECTIVES}, got {objective!r}.")


def split(
    tokens: inputs.TokensLike, cfg: Config, verify_share: float
) -> tuple[Int[np.ndarray, "C T"], Int[np.ndarray, "V T"]]:
    """Windows to calibrate on and windows to verify on, in the order of the text.

    Raises:
      InputError: Rows of several lengths, windows without a prompt, or fewer than two windows for
        either: a bound needs two.
    """
    batch = inputs.make_batch(tokens, cfg.model)
    lengths = np.unique(batch.lengths_B)
    if len(lengths) > 1:
        raise InputError(
            f"calibration needs windows of one length, got {lengths.min()} to {lengths.max()} "
            "tokens: cut the text with qs_jax.evaluation.cut_windows."
        )
    width, count = int(lengths[0]), len(batch.tokens_BT)
    if cfg.effective_protocol == "continuation" and width <= cfg.continuation_tokens:
        raise InputError(
            f"windows of {width} tokens have no prompt before their last "
            f"{cfg.continuation_tokens}: longer windows, or fewer continuation_tokens."
        )
    verifying = round(count * verify_share)
    if min(verifying, count - verifying) < 2:
        raise InputError(
            f"{count} windows are too few: two at least to calibrate on and two to verify on, "
            "whose differences give the confidence bound. Give more text or shorter windows."
        )
    tokens_WT = batch.tokens_BT[:, :width]
    return tokens_WT[: count - verifying], tokens_WT[count - verifying :]


def _space(
    policy: str,
    task: Task,
    observed: Observed,
    layers: Sequence[int] | None,
    fusion: bool,
) -> Space:
    model, maps = task.cfg.model, task.params.get("kv_maps")
    if policy == "extrapolate":
        if maps is None:
            raise ConfigError(
                "policy 'extrapolate' needs maps: put those of qs_jax.fit_kv_maps, fitted on other "
                "text, into params['kv_maps']."
            )
        maps.check(model)
        chosen = tuple(sorted(set(layers) & set(maps.layers))) if layers else tuple(maps.layers)
    elif policy in ("skip", "propagate"):
        chosen = tuple(layers) if layers else halting_layers(model)
    else:
        raise ConfigError(
            f"policies can be 'skip', 'propagate' and 'extrapolate', got {policy!r}: 'attended' "
            "has a threshold of its own (Observed.tau_kv)."
        )
    if not chosen or min(chosen) < 1 or max(chosen) > model.num_layers - 1:
        raise ConfigError(f"layers must be between 1 and {model.num_layers - 1}, got {chosen}.")
    continued = task.cfg.effective_protocol == "continuation"
    rule = "quota" if continued else "dual"
    narrows = task.objective == "paper_flops"
    return Space(policy, policy, rule, chosen, observed, model, fusion, narrows)


def _result(
    task: Task,
    best: Point | None,
    told: list[dict[str, Any]],
    spaces: dict[str, Space],
    points: list[Point],
    front: tuple[Point, ...],
    observed: Observed,
    data: str,
    timed_runs: int,
) -> Calibration:
    model = task.cfg.model
    qs = presets.off(model)
    verified: dict[str, Any] = {"reason": _why_off(front, told, task.max_ppl_increase)}
    if best is not None:
        qs = spaces[best.family].preset(best.levels, lean=True)
        verified = dict([entry for entry in told if entry["within_budget"]][-1])
        verified["measured_time_saved"] = None
    params = params_for(task, qs)
    if best is not None and timed_runs:
        verified["measured_time_saved"] = time_saved(
            params, task.tokens_WT[: task.batch_size], task.cfg.replace(quicksilver=qs), timed_runs
        )
    provenance = {
        "source": "qs_jax.calibrate",
        "calibrated_on": data or "tokens given to qs_jax.calibrate",
        "tokens_sha256": hashlib.sha256(task.tokens_WT.astype("<i4").tobytes()).hexdigest(),
        "seq_len": int(task.tokens_WT.shape[1]),
        "protocol": task.cfg.effective_protocol,
        "continuation_tokens": task.cfg.continuation_tokens,
        "max_ppl_increase": task.max_ppl_increase,
        "objective": task.objective,
        "dtype": model.dtype,
        "verified": verified | {"dense_perplexity": task.dense.perplexity, "data": data},
    }
    qs = dataclasses.replace(qs, provenance=provenance)
    return Calibration(qs, params, tuple(points), front, tuple(told), observed)


def _why_off(front: Sequence[Point], told: list[dict[str, Any]], budget: float) -> str:
    if told:
        bound = told[0]["upper_bound"]
        shown = "unbounded" if bound is None else f"+{bound:.3g}"
        beyond = [name for name, e in told[0].get("also", {}).items() if not e["within_budget"]]
        where = "the verification windows"
        if bound is not None and bound <= budget and beyond:
            other = told[0]["also"][beyond[0]]["upper_bound"]
            where, shown = beyond[0], "unbounded" if other is None else f"+{other:.3g}"
        return (
            f"the safest candidate's bound on {where} is {shown}, above the budget of "
            f"{budget:g}: off. More windows narrow it."
        )
    if front:
        least = min(point.ppl_increase for point in front)
        return f"the gentlest candidate costs +{least:.3g}, above the budget of {budget:g}: off."
    return "no candidate saves anything: off."


def time_saved(
    params: Params, tokens_WT: Int[np.ndarray, "W T"], cfg: Config, runs: int = 3
) -> float:
    """Share of the dense time that the compact engine saves on the work that was scored.

    Under "continuation" that is the prefill of the prompts, else the scoring of whole windows.
    Both are called in turn (A B A B) after a warm-up each; the share is 1 less the median of the
    ratios of neighbours. Of calls as a user makes them: checks and records included.

    Args:
      params: With the maps that the mechanisms read.
      tokens_WT: Windows of one batch.
      cfg: Mechanisms and protocol.
      runs: Of each.
    """
    continued = cfg.effective_protocol == "continuation"
    rows_WT = (
        tokens_WT[:, : tokens_WT.shape[1] - cfg.continuation_tokens] if continued else tokens_WT
    )
    fast = cfg.replace(engine="compact", max_new_tokens=1, eos_token_ids=())
    dense = fast.replace(quicksilver=None)

    def seconds(one: Config) -> float:
        began = time.perf_counter()
        jax.block_until_ready((generate if continued else score)(params, rows_WT, one).logprobs)
        return time.perf_counter() - began

    for one in (dense, fast):
        seconds(one)
    pairs = [(seconds(dense), seconds(fast)) for _ in range(runs)]
    return 1 - median(after / before for before, after in pairs)
