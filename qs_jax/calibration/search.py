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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from qs_jax import presets
from qs_jax.calibration import climb
from qs_jax.calibration.climb import OBJECTIVES, Point, Task, params_for, score_tokens
from qs_jax.calibration.families import Space, check_layers, halting_layers
from qs_jax.calibration.observe import Observed, observe
from qs_jax.config import Config, ModelConfig, QuickSilverConfig
from qs_jax.config.fields import Above0, Count, Positive, Share, parse
from qs_jax.engine import inputs
from qs_jax.engine.generate import generate
from qs_jax.engine.prompt_plan import runs_fast
from qs_jax.engine.weights import check_params
from qs_jax.errors import ConfigError, InputError
from qs_jax.evaluation.perplexity import check_width
from qs_jax.files import write_json, write_whole
from qs_jax.models import Params


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Result of a search.

    Attributes:
      preset: Within the budget on the verification windows; `off` if nothing is. Its provenance
        names the text it was calibrated on and has the measures under "verified".
      params: Those of the call, with the maps the preset reads and no others.
      points: All candidates measured on the calibration windows.
      front: Those of them that none beats in both saving and perplexity.
      verified: Measures of each candidate of the walk on the verification windows.
      observed: Percentiles of the signals.
    """

    preset: QuickSilverConfig
    params: Params
    points: tuple[Point, ...]
    front: tuple[Point, ...]
    verified: tuple[dict[str, Any], ...]
    observed: Observed

    def save(self, path: Path, model: ModelConfig) -> list[Path]:
        """Write the preset, the search and the maps it reads, all or none; returns the files."""
        paths = result_files(path)[: 2 if self.params.get("kv_maps") is None else 3]
        with write_whole(*paths) as (preset, searched, *read):
            presets.save(preset, self.preset, model)
            write_json(searched, self.to_dict())
            for staged in read:
                self.params["kv_maps"].save(staged)
        return paths

    def to_dict(self) -> dict[str, Any]:
        """The whole search as plain JSON types."""
        return {
            "preset": self.preset.to_dict(),
            "points": [dataclasses.asdict(point) for point in self.points],
            "front": [dataclasses.asdict(point) for point in self.front],
            "verified": list(self.verified),
            "observed": self.observed.to_dict(),
        }


def result_files(path: Path) -> list[Path]:
    """FILE.json for the preset, FILE.search.json, and the file of the maps it may read."""
    return [path, path.parent / f"{path.stem}.search.json", presets.maps_path(path)]


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
      timed_runs: Runs of the winner and of the dense model, in turn, for the measured time of a
        prefill; 0 for none.
      progress: Show progress bars.

    Raises:
      ConfigError: A setting is out of range or does not fit the model or the maps.
      InputError: Too few windows, windows too short for the protocol, or rows of several lengths.
    """
    parse("max_ppl_increase", max_ppl_increase, Above0)
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective must be one of {OBJECTIVES}, got {objective!r}.")
    parse("confidence", confidence, Share)
    parse("verify_share", verify_share, Share)
    parse("max_evaluations", max_evaluations, Positive)
    parse("candidates", candidates, Positive)
    parse("timed_runs", timed_runs, Count)
    check_params(params, cfg.model)
    cfg = cfg if cfg.protocol is not None else cfg.replace(protocol="continuation")
    cfg = cfg.replace(quicksilver=None, engine="masked")
    calibrating_WT, verifying_WT = split(tokens, cfg, verify_share)
    others = {name: np.concatenate(split(more, cfg, 0.5)) for name, more in (also or {}).items()}
    if policies is None:
        policies = ("skip", "extrapolate") if params.get("kv_maps") is not None else ("skip",)
    places = {policy: _places(policy, params, cfg.model, layers) for policy in policies}
    observed = observe(params, calibrating_WT, cfg.model, batch_size=batch_size, progress=progress)
    dense = score_tokens(params, calibrating_WT, cfg, batch_size)
    task = Task(params, cfg, calibrating_WT, dense, float(max_ppl_increase), objective, batch_size)
    rule = "quota" if cfg.effective_protocol == "continuation" else "dual"
    rest = (observed, cfg.model, fusion, objective == "paper_flops")
    spaces = {policy: Space(policy, rule, at, *rest) for policy, at in places.items()}
    points: list[Point] = []
    for space in spaces.values():
        points += climb.climb(task, space, max_evaluations, progress=progress)
    front = climb.pareto(points)
    verifier = task.on(verifying_WT)
    # All windows of the other texts verify.
    more = {name: task.on(tokens_WT) for name, tokens_WT in others.items()}
    walk = climb.spread(front, task, candidates)
    walked = climb.verify(verifier, walk, spaces, confidence, also=more, progress=progress)
    best, entries = walked
    if best is None:
        reason = f"no candidate keeps the budget of {max_ppl_increase:g} on other windows: off."
        qs, verified = presets.off(cfg.model), {"reason": reason}
    else:
        qs = spaces[best.family].preset(best.levels, lean=True)
        verified = [entry for entry in entries if entry["within_budget"]][-1] | {
            "measured_time_saved": time_saved(verifier, qs, timed_runs) if timed_runs else None
        }
    qs = dataclasses.replace(qs, provenance=_provenance(verifier, verified, data))
    return Calibration(qs, params_for(task, qs), tuple(points), front, tuple(entries), observed)


def calibrate(
    params: Params, tokens: inputs.TokensLike, cfg: Config, **settings: Any
) -> QuickSilverConfig:
    """The preset that saves most within a quality budget: `search(...).preset`, arguments as there.

    It is `off` if nothing keeps the budget; its provenance has the measures.
    """
    return search(params, tokens, cfg, **settings).preset


def split(
    tokens: inputs.TokensLike, cfg: Config, verify_share: float
) -> tuple[Int[np.ndarray, "C T"], Int[np.ndarray, "V T"]]:
    """Windows to calibrate on and windows to verify on, in the order of the text."""
    batch = inputs.make_batch(tokens, cfg.model)
    lengths = np.unique(batch.lengths_B)
    if len(lengths) > 1:
        raise InputError("calibration needs windows of one length: qs_jax.evaluation.cut_windows.")
    check_width(int(lengths[0]), cfg)
    count = len(batch.tokens_BT)
    verifying = round(count * verify_share)
    if min(verifying, count - verifying) < 2:
        raise InputError(
            f"{count} windows are too few: two at least to calibrate on and two to verify on. "
            "Give more text or shorter windows."
        )
    tokens_WT = batch.tokens_BT[:, : lengths[0]]
    return tokens_WT[: count - verifying], tokens_WT[count - verifying :]


def _places(
    policy: str, params: Params, model: ModelConfig, layers: Sequence[int] | None
) -> tuple[int, ...]:
    """Layers at which tokens may halt under a policy."""
    if policy not in ("skip", "propagate", "extrapolate"):
        raise ConfigError(
            f"policies are skip, propagate and extrapolate, got {policy!r}: attended has a "
            "threshold of its own (Observed.tau_kv)."
        )
    places = set(layers or halting_layers(model))
    if policy == "extrapolate":
        if (maps := params.get("kv_maps")) is None:
            raise ConfigError("extrapolate needs maps of qs_jax.fit_kv_maps in params['kv_maps'].")
        maps.check(model)
        places = places & set(maps.layers) if layers else set(maps.layers)
    return check_layers(places, model)


def _provenance(task: Task, verified: dict[str, Any], data: str) -> dict[str, Any]:
    return {
        "source": "qs_jax.calibrate",
        "calibrated_on": data or "tokens given to qs_jax.calibrate",
        "tokens_sha256": hashlib.sha256(task.tokens_WT.astype("<i4").tobytes()).hexdigest(),
        "seq_len": int(task.tokens_WT.shape[1]),
        "protocol": task.cfg.effective_protocol,
        "continuation_tokens": task.cfg.continuation_tokens,
        "max_ppl_increase": task.max_ppl_increase,
        "objective": task.objective,
        "dtype": task.cfg.model.dtype,
        "verified": verified | {"dense_perplexity": task.dense.perplexity, "data": data},
    }


def time_saved(task: Task, qs: QuickSilverConfig, runs: int) -> float | None:
    """Share of the dense prefill's time that a preset saves, by runs of both in turn.

    None under "teacher-forced", which has no prompts, and where no fast engine runs the preset.
    """
    fast = task.cfg.replace(quicksilver=qs, engine="auto", max_new_tokens=1, eos_token_ids=())
    if fast.effective_protocol != "continuation" or not runs_fast(fast, generates=True):
        return None
    prompts_WT = task.tokens_WT[: task.batch_size, : -task.cfg.continuation_tokens]
    params = params_for(task, qs)

    def seconds(cfg: Config) -> float:
        began = time.perf_counter()
        jax.block_until_ready(generate(params, prompts_WT, cfg).logprobs)
        return time.perf_counter() - began

    pairs = [(seconds(fast.replace(quicksilver=None)), seconds(fast)) for _ in range(runs + 1)]
    return 1 - median(after / before for before, after in pairs[1:])
