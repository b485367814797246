"""Host side of the compact engine: where segments end, and how many token slots they get."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from qs_jax.config import Config, QuickSilverConfig
from qs_jax.engine.batching import Batch
from qs_jax.engine.compact import Schedule, Segments
from qs_jax.errors import ConfigError
from qs_jax.mechanisms.decide import Overrides
from qs_jax.mechanisms.plan import NEVER, Numbers, Plan, bind

# Segments into which layers are cut where tokens may leave at any of them.
SEGMENTS = 4
# A row's slots are a multiple of this (or of a 64th of the width), so that few programs are made.
GRANULE = 8
# "dynamic" chooses among this many even steps where the count is not known; each is a body more.
STEPS = 6
SMALLEST_STEP = 16


class Prompts(NamedTuple):
    """What is known of a batch before it runs.

    Attributes:
      lengths_B: Tokens of each row.
      prompt_lengths_B: Tokens of its prompt.
      eligible_B: Tokens of the prompt that may stop.
    """

    lengths_B: np.ndarray
    prompt_lengths_B: np.ndarray
    eligible_B: np.ndarray


def bind_call(cfg: Config, engine: str) -> tuple[Plan, Numbers] | None:
    """The two halves of a call's mechanisms on an engine; None when none runs.

    Args:
      cfg: The call.
      engine: Its engine; the halves are the same on all.
    """
    del engine
    return bind(cfg.quicksilver, cfg.model, cfg.effective_protocol)


def uses_compact(cfg: Config) -> bool:
    """Whether a call runs on the compact engine.

    Raises:
      ConfigError: It was asked for and cannot.
    """
    if cfg.engine == "masked" or cfg.quicksilver is None:
        return False
    if "final_prev" in cfg.quicksilver.entropies:
        if cfg.engine == "compact":
            raise ConfigError(
                "entropy 'final_prev' reads the output one token earlier, so rows run token by "
                "token: use engine 'masked' or another estimator."
            )
        return False
    return True


def arrange(
    cfg: Config,
    padded: Batch,
    prompt_lengths_B: np.ndarray,
    overrides: Overrides | None,
    plan: Plan,
) -> tuple[Schedule, Segments]:
    """Segments and capacities of a call.

    Args:
      cfg: Mechanisms, and protocol.
      padded: Rows as the program gets them.
      prompt_lengths_B: Tokens of each prompt; 0 where rows are scored teacher-forced.
      overrides: Of single tokens, or None.
      plan: Static half of the mechanisms.
    """
    qs, layers = cfg.quicksilver, cfg.model.num_layers
    assert qs is not None
    ends = _ends(qs, cfg, overrides, plan)
    first = [1, *(end + 1 for end in ends[:-1])]
    whole_layers = _whole_layers(qs, plan)
    whole = [begin == end and end in whole_layers for begin, end in zip(first, ends, strict=True)]
    assert ends[-1] == layers
    width = padded.tokens_BT.shape[1]
    prompts = _prompts(padded, prompt_lengths_B, overrides, qs, plan)
    left = _left_after(cfg, qs, prompts)
    granule = max(GRANULE, width // 64)

    def slots(count: int) -> int:
        return min(-(-count // granule) * granule, width)

    fixed = _counted(qs, plan, overrides)
    longest, leading = 0, False
    if fixed:
        capacities = tuple(
            width if all_of_it else slots(_entering(begin, left, prompts))
            for begin, all_of_it in zip(first, whole, strict=True)
        )
    else:
        step = max(SMALLEST_STEP, -(-width // STEPS))
        found = {slots(count) for _, count in left} | {width}
        found |= {slots(step * k) for k in range(1, STEPS + 1)}
        capacities = tuple(sorted(found))
        part = math.ceil(layers / SEGMENTS)  # few values, so that sweeps share programs
        sizes = [end - begin + 1 for begin, end in zip(first, ends, strict=True)]
        leading = sizes[0] >= max(part // 2, 2)
        longest = max(sizes[leading:], default=1)
        longest = min(math.ceil(longest / part) * part, layers)
    schedule = Schedule(capacities, fixed, longest, leading, _keeps_keys(qs, overrides))
    return schedule, Segments(
        first_S=jnp.asarray(np.array(first, np.int32)),
        last_S=jnp.asarray(np.array(ends, np.int32)),
        whole_S=jnp.asarray(np.array(whole, bool)),
    )


def _counted(qs: QuickSilverConfig, plan: Plan, overrides: Overrides | None) -> bool:
    """How many tokens compute is known beforehand: only quotas stop them."""
    halting = qs.halting
    if halting is not None and halting.freeze:
        forced = overrides is not None and bool(np.any(overrides.forced_layer_BT < NEVER))
        if halting.rule != "quota" or halting.forced_ids or forced:
            return False
    return qs.fusion is None or not plan.continuation


def _ends(qs: QuickSilverConfig, cfg: Config, overrides: Overrides | None, plan: Plan) -> list[int]:
    """Last layer of each segment."""
    layers, halting = cfg.model.num_layers, qs.halting
    ends = {layers}

    def cut_from(layer: int) -> set[int]:
        return set(range(layer, layers, math.ceil((layers - layer) / SEGMENTS) or 1))

    if halting is not None and halting.freeze:
        allowed = (np.flatnonzero(halting.may_halt(layers)) + 1).tolist()
        if halting.layers is not None:
            ends |= set(allowed)
        elif allowed:
            ends |= cut_from(allowed[0])
        forced = {halting.forced_layer} if halting.forced_layer is not None else set()
        if overrides is not None:
            found = np.unique(overrides.forced_layer_BT)
            forced |= set(found[found < NEVER].tolist())
        ends |= forced if len(forced) <= SEGMENTS else cut_from(min(forced))
    if qs.fusion is not None and plan.continuation:  # absorbed tokens stop
        ends |= cut_from(max(qs.fusion.first_layer, 1))
    for layer in _whole_layers(qs, plan):
        ends |= {layer - 1, layer}
    return sorted(end for end in ends if 1 <= end <= layers)


def _whole_layers(qs: QuickSilverConfig, plan: Plan) -> set[int]:
    """Layers at which every token gets something, whether it computes or not."""
    layers = {qs.amq.layer} if qs.amq is not None and plan.amq is not None else set()
    if plan.shortlist_size and qs.shortlist_layer is not None:
        layers.add(qs.shortlist_layer)
    return layers


def _keeps_keys(qs: QuickSilverConfig, overrides: Overrides | None) -> bool:
    skip = qs.kv_skip
    if qs.halting is None:
        return False
    if skip is None or skip.policy != "skip" or skip.delay > 0 or skip.retain_ids:
        return True
    return overrides is not None and bool(np.any(overrides.retain_BT))


def _prompts(
    padded: Batch,
    prompt_lengths_B: np.ndarray,
    overrides: Overrides | None,
    qs: QuickSilverConfig,
    plan: Plan,
) -> Prompts:
    """Counts the tokens that may stop, as `decide.rows` and `decide.eligible` choose them."""
    pos_1T = np.arange(padded.tokens_BT.shape[1])[None]
    ends_B1 = prompt_lengths_B[:, None] - max(qs.recent_tokens, 1)
    protected = list({*plan.special_ids, *qs.protect_ids})
    may_BT = (pos_1T >= qs.sink_tokens) & (pos_1T < ends_B1)
    may_BT &= ~np.isin(padded.tokens_BT, protected)
    if overrides is not None:
        may_BT &= ~np.asarray(overrides.full_BT)
    return Prompts(padded.lengths_B, prompt_lengths_B, may_BT.sum(1))


def _left_after(cfg: Config, qs: QuickSilverConfig, prompts: Prompts) -> list[tuple[int, int]]:
    """(layer, most tokens of a row that compute after it), where that is known beforehand."""
    left = []
    halting = qs.halting
    if halting is not None and halting.rule == "quota" and halting.freeze:
        assert halting.layers is not None
        allowed = halting.may_halt(cfg.model.num_layers)
        for layer, share in zip(halting.layers, halting.quota, strict=True):
            if allowed[layer - 1]:
                gone_B = np.floor(share * prompts.eligible_B + 1e-3).astype(int)
                left.append((layer, int((prompts.lengths_B - gone_B).max())))
    return left


def _entering(first: int, left: list[tuple[int, int]], prompts: Prompts) -> int:
    """Most tokens of a row that compute from layer `first` on."""
    counts = [count for layer, count in left if layer < first]
    return min([*counts, int(prompts.lengths_B.max())])
