"""Find the preset that saves most within a quality budget, and check it on other text.

1. *Observe*: percentiles of the signals on the calibration windows, where thresholds are knobs.
2. *Search*: light layers are fitted for some first layers and prices, each with some stops. Other
   policies climb from the dense model, one step of one knob at a time, the step that saves most for
   what it costs (lazy greedy search, Minoux 1978). Candidates are compared by their KL divergence
   from the dense model, which tells two apart on a tenth of the windows that perplexity needs.
3. *Verify*: candidates of the front, the safest first, are scored on disjoint windows; the last one
   whose upper confidence bound stays within the budget, and that loses no retrieval, wins. The
   first that fails ends the walk. Testing in an order fixed beforehand needs no correction for
   having tested several (fixed sequence testing; Angelopoulos et al. 2021, "Learn then Test"). At
   each longer length the same candidate is walked with ever fewer tokens exempt.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from qs_jax import presets
from qs_jax.calibration import climb
from qs_jax.calibration.climb import OBJECTIVES, Point, Probe, Task, time_saved
from qs_jax.calibration.families import (
    LightSpace,
    Space,
    bits_for,
    check_layers,
    halting_layers,
)
from qs_jax.calibration.fit_light import PRICES, FittingText, Stream
from qs_jax.calibration.observe import Observed, observe
from qs_jax.calibration.scores import score_tokens
from qs_jax.config import Config, KVSkipConfig, ModelConfig, QuickSilverConfig
from qs_jax.config.fields import Above0, Count, Positive, Share, parse
from qs_jax.config.mechanisms import Score
from qs_jax.engine import inputs
from qs_jax.engine.weights import check_params
from qs_jax.errors import ConfigError, InputError
from qs_jax.evaluation.perplexity import check_width
from qs_jax.files import write_json, write_whole
from qs_jax.models import Params
from qs_jax.state import NEVER

# First light layers and stops that are tried, as shares of the depth.
_LIGHT_FROM, _STOPS = (0.4, 0.53), (0.66, 0.85)
LIGHT_SHARES = (0.8,)
# Exempt tokens at the end of a longer prompt that are tried, the safest first.
_RECENT = (512, 256, 192, 128, 64, 32)


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
      observed: Percentiles of the signals; None where no threshold is a knob.
    """

    preset: QuickSilverConfig
    params: Params
    points: tuple[Point, ...]
    front: tuple[Point, ...]
    verified: tuple[dict[str, Any], ...]
    observed: Observed | None

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
            "observed": None if self.observed is None else self.observed.to_dict(),
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
    policies: Sequence[Any] | None = None,
    score: Any = "attention",
    layers: Sequence[int] | None = None,
    fusion: bool = True,
    max_evaluations: int = 60,
    candidates: int = 4,
    batch_size: int = 4,
    data: str | Sequence[str] = "",
    timed_runs: int = 3,
    fit_tokens: inputs.TokensLike | None = None,
    light_from: Sequence[int] | None = None,
    prices: Sequence[float] = PRICES,
    light_shares: Sequence[float] = LIGHT_SHARES,
    longer: Sequence[inputs.TokensLike] = (),
    probe: Probe | None = None,
    progress: bool = False,
) -> Calibration:
    """Search over all mechanisms together.

    Args:
      params: From `qs_jax.load`; with "kv_maps", fitted on other text, "extrapolate" is a choice.
      tokens: Windows of one length, `[W, T]`; the last `verify_share` of them verify.
      cfg: Model and protocol: under "continuation" (the default here) mechanisms act on the first
        T - `continuation_tokens` tokens of each window and the others are scored.
      max_ppl_increase: The budget, in perplexity.
      objective: What to maximise: "exact_flops", "paper_flops", "layer_tokens", "kv_bytes" or
        measured "time" saved. Bits are tried for "paper_flops" (int8 products from the middle on)
        and "kv_bytes" (int8 keys and values from the second layer on).
      confidence: Of the bound that must stay within the budget.
      verify_share: Share of the windows that is kept for verifying.
      also: Windows of other texts, by name, as long as those of `tokens`: a preset must stay within
        the budget on each of them, too.
      policies: Families to try: "light", which needs `fit_tokens`, and the KV policies "skip",
        "propagate", "extrapolate" and your own (`KVSkipConfig.policy`). By default "skip" for
        "kv_bytes", else "light" if it can be and `score` is not given; else "skip" and, where there
        are maps, "extrapolate".
      score: What the quotas of these KV policies rank by (`HaltingConfig.score`).
      layers: Where tokens may halt; by default eight layers from 0.4 of the depth on, of which
        light tokens stop at those between two thirds and 0.85. With "extrapolate", those of the
        maps.
      fusion: Try fusing.
      max_evaluations: Candidates measured for each policy.
      candidates: Of the front, to be verified.
      batch_size: Windows at a time.
      data: Name of the text, for the provenance; or of several, whose windows take turns in
        `tokens` and `longer`: the preset is held against the budget on all together, and its
        measures on each are told.
      timed_runs: Runs of the winner and of the dense model, in turn, for the measured time of a
        prefill; 0 for none.
      fit_tokens: Windows of one length to fit light layers on, disjoint from `tokens`.
      light_from: First light layers to try; by default at 0.4 and 0.53 of the depth.
      prices: Least gains worth the work of a layer (`qs_jax.calibration.sensitivity`): each gives
        other sizes.
      light_shares: Shares of a prompt's tokens that run light; the others, which later ones are
        expected to attend most, run whole.
      longer: Windows of other lengths, the shorter first, at which the preset is verified, too. It
        is dense at lengths where nothing keeps the budget.
      probe: Retrieval under a preset: a function of parameters, configuration and task.
      progress: Show progress bars, with the time left.

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
    check_params(params, cfg.model, floats=True)
    cfg = cfg if cfg.protocol is not None else cfg.replace(protocol="continuation")
    cfg = cfg.replace(quicksilver=None)
    calibrating_WT, verifying_WT = split(tokens, cfg, verify_share)
    others = {name: np.concatenate(split(more, cfg, 0.5)) for name, more in (also or {}).items()}
    texts = (data,) if isinstance(data, str) else tuple(data)
    if any(len(part) % len(texts) for part in (calibrating_WT, verifying_WT, *longer)):
        raise InputError(f"windows of {len(texts)} texts take turns: give as many of each.")
    name = ", ".join(texts)
    continues = cfg.effective_protocol == "continuation"
    score = parse("score", score, Score)
    if policies is None and objective == "kv_bytes":
        policies = ("skip",)
    elif policies is None and fit_tokens is not None and continues and score == "attention":
        policies = ("light",)
    elif policies is None:
        policies = ("skip", "extrapolate") if params.get("kv_maps") is not None else ("skip",)
    if "light" in policies and not (continues and fit_tokens is not None):
        raise ConfigError("light layers need protocol 'continuation', and fit_tokens to fit on.")
    if "attended" in policies:
        raise ConfigError("policy 'attended' has a threshold of its own (Observed.tau_kv).")
    climbing = [KVSkipConfig(policy) for policy in policies if policy != "light"]
    if score != "attention" and not (continues and climbing):
        raise ConfigError("a score is of quotas: protocol 'continuation', and a KV policy to try.")
    places = {skip: _places(skip, params, cfg.model, layers) for skip in climbing}
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    observed = observe(params, calibrating_WT, cfg.model, **options) if climbing else None
    plain = {name: part for name, part in params.items() if name != "kv_maps"}
    dense = score_tokens(plain, calibrating_WT, cfg, batch_size)
    asked = (float(max_ppl_increase), objective, batch_size, texts)
    task = Task(params, cfg, calibrating_WT, dense, *asked)
    spaces: dict[str, Any] = {}
    points: list[Point] = []
    for skip, at in places.items():
        assert observed is not None
        rest = (observed, cfg.model, fusion, bits_for(objective, cfg.model), score)
        space = Space(skip, "quota" if continues else "dual", at, *rest)
        spaces[space.policy] = space
        points += climb.climb(task, space, max_evaluations, progress=progress)
    if "light" in policies:
        spaces["light"] = LightSpace({}, tuple(light_shares))
        text = (fit_tokens, light_from, prices, layers, name)
        points += _explore_light(task, spaces["light"], *text, progress=progress)
    front = climb.pareto(points)
    verifier = task.on(verifying_WT)
    # All windows of the other texts verify.
    more = {each: task._replace(texts=(each,)).on(others[each]) for each in others}
    walk = climb.spread(front, task, candidates)
    told: dict[str, Any] = {"probe": probe, "progress": progress}
    best, entries = climb.verify(verifier, walk, spaces, confidence, also=more, **told)
    if best is None:
        reason = f"no candidate keeps the budget of {max_ppl_increase:g} on other windows: off."
        qs, verified = presets.off(cfg.model), {"reason": reason}
        kept = plain
    else:
        family = spaces[best.family]
        qs = family.preset(best.levels, lean=True)
        verified = [entry for entry in entries if entry["within_budget"]][-1]
        verified |= _timed(verifier, family, best, qs, timed_runs)
        width = verifying_WT.shape[1]
        by_length = {str(width): dict(verified)}
        for windows in longer:
            at = verifier.on(np.concatenate(split(windows, cfg, 0.5)))
            qs, found = _at_length(at, spaces, best, qs, width, confidence, **told)
            entries += found
            width = at.tokens_WT.shape[1]
            good = [entry for entry in found if entry["within_budget"]]
            timed = _timed(at, family, best, qs, timed_runs) if good else {}
            by_length[str(width)] = (good or [{"within_budget": False}])[-1] | timed
        verified["lengths"] = by_length
        kept = family.params(params, best.levels, qs)
    qs = dataclasses.replace(qs, provenance=_provenance(verifier, verified, name))
    return Calibration(qs, kept, tuple(points), front, tuple(entries), observed)


def _explore_light(
    task: Task,
    space: LightSpace,
    fit_tokens: inputs.TokensLike,
    light_from: Sequence[int] | None,
    prices: Sequence[float],
    layers: Sequence[int] | None,
    data: str,
    *,
    progress: bool,
) -> Iterator[Point]:
    """Fit streams of light layers, and measure each at each stop."""
    depth = task.cfg.model.num_layers
    firsts = sorted(set(light_from or [max(round(share * depth), 2) for share in _LIGHT_FROM]))
    places = check_layers(layers or halting_layers(task.cfg.model), task.cfg.model)
    deep = [at for at in places if _STOPS[0] <= at / depth <= _STOPS[1]] or [places[-1]]
    stops = {first: [at for at in (layers or deep) if at >= first] for first in firsts}
    if not any(stops.values()):
        got = f"light layers from {firsts}, stops at {list(layers or deep)}"
        raise ConfigError(f"light tokens stop at the first light layer or later, got {got}.")
    given: dict[str, Any] = {"data": data, "progress": progress}
    text = FittingText(task.params, fit_tokens, task.cfg.model, firsts, **given)
    for first in firsts:
        for number, price in enumerate(prices):
            stream = Stream(text, first, price)
            for stop in stops[first]:
                while stream.layer < stop:
                    stream.step()
                space.maps[first, stop, number] = stream.stop()
                for share in range(len(space.shares)):
                    yield climb.point(task, space, (first, stop, number, share))


def _at_length(
    task: Task,
    spaces: Mapping[str, Any],
    best: Point,
    qs: QuickSilverConfig,
    over: int,
    confidence: float,
    **told: Any,
) -> tuple[QuickSilverConfig, list[dict[str, Any]]]:
    """The preset, with as few exempt tokens in prompts over a length as windows here allow.

    Also the measures of each try. Where none keeps the budget, such prompts run dense.
    """
    width = task.tokens_WT.shape[1]

    def exempt(recent: int) -> QuickSilverConfig:
        pairs = (*qs.recent_tokens_over, (over, recent))
        return dataclasses.replace(qs, recent_tokens_over=pairs)

    tries = [recent for recent in _RECENT if recent < width // 2]
    told["variants"] = [exempt(recent) for recent in tries]
    _, entries = climb.verify(task, [best] * len(tries), spaces, confidence, **told)
    for recent, entry in zip(tries, entries, strict=False):
        entry |= {"recent_tokens": recent, "seq_len": width}
    good = [entry["recent_tokens"] for entry in entries if entry["within_budget"]]
    return exempt(good[-1] if good else NEVER), entries


def _timed(
    task: Task, family: Any, best: Point, qs: QuickSilverConfig, runs: int
) -> dict[str, Any]:
    saved = time_saved(task, family, best.levels, qs, runs) if runs else None
    return {"measured_time_saved": saved}


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
    skip: KVSkipConfig, params: Params, model: ModelConfig, layers: Sequence[int] | None
) -> tuple[int, ...]:
    """Layers at which tokens may halt under a policy."""
    places = set(layers or halting_layers(model))
    if skip.policy == "extrapolate":
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
