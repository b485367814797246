"""The host's side of the prompt engine: what it can run, its segments and their slots."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from qs_jax.config import Config, QuickSilverConfig
from qs_jax.engine.inputs import Batch
from qs_jax.engine.prompt_call import Plan, Segments
from qs_jax.errors import ConfigError
from qs_jax.mechanisms import Mechanisms, Overrides
from qs_jax.state import NEVER

# Segments into which layers are cut where tokens may leave at any of them.
SEGMENTS = 4
# A row's slots are a multiple of this (or of a 64th of the width), so that few programs are made.
GRANULE = 8
# Even steps among which slots are chosen where tokens stop by signals; each compiles one body.
STEPS = 6
SMALLEST_STEP = 16


def refusal(cfg: Config, *, generates: bool) -> str | None:
    """Why the fast engines cannot generate (or score) with a configuration; None if they can."""
    qs, prompts_only = cfg.quicksilver, cfg.effective_protocol == "continuation"
    if qs is None or qs.is_off:
        return None
    skip, fusion, amq = qs.kv_skip, qs.fusion, qs.amq
    if not generates and not prompts_only:
        return "teacher-forced scoring is the masked engine's"
    if "final_prev" in qs.entropies:
        return "entropy 'final_prev' reads the model's output one token earlier"
    if skip is not None and skip.policy == "attended":
        return "kv_skip.policy 'attended' needs the attention weights of every layer"
    if qs.halting is not None and not qs.halting.freeze:
        return "halting with freeze=False leaves no work out"
    if fusion is not None and not prompts_only:
        return "fusion of new tokens is the masked engine's: use protocol='continuation'"
    if fusion is not None and (
        fusion.window > 1
        or fusion.alpha != "uniform"
        or fusion.tau_ctx is not None
        or fusion.proportional_attention
    ):
        return "fusion beyond the uniform mean of adjacent tokens is the masked engine's"
    if amq is not None and (amq.execution == "fake" or "hidden" in amq.targets):
        return "only int8 products and keys are executed: other quantization is simulated"
    if amq is not None and amq.entropy == "shortlist":
        return "bits by the shortlist entropy are the masked engine's"
    if amq is not None and amq.normalization == "minmax" and not prompts_only:
        return "min-max entropy looks at all tokens of a batch at once"
    if skip is not None and skip.is_custom and not prompts_only:
        return "a KV policy of your own fills in prompts: with new tokens it is the masked engine's"
    if amq is not None and skip is not None and skip.reads_frozen:
        assert qs.halting is not None
        if (qs.halting.layers or (0,))[0] < amq.layer:
            return "extrapolated keys of tokens that halt before amq.layer have no bits yet"
    return None


def runs_fast(cfg: Config, *, generates: bool) -> bool:
    """Whether a call runs on the fast engines; `ConfigError` if they are required and cannot."""
    reason = refusal(cfg, generates=generates)
    if reason is not None and cfg.engine == "compact":
        raise ConfigError(f"engine 'compact' cannot run this: {reason}. Use engine 'masked'.")
    off = cfg.quicksilver is None or cfg.quicksilver.is_off
    return reason is None and (off or cfg.engine != "masked")


def arrange(
    cfg: Config,
    padded: Batch,
    prompt_lengths_B: np.ndarray,
    overrides: Overrides | None,
    mech: Mechanisms,
) -> tuple[Plan, Segments]:
    """Segments of a call's prompts, and their slots."""
    qs, layers = cfg.quicksilver or QuickSilverConfig(), cfg.model.num_layers
    ends = _ends(qs, layers, overrides)
    first = [1, *(end + 1 for end in ends[:-1])][: len(ends)]
    width = padded.tokens_BT.shape[1]
    eligible_B = _eligible(padded, prompt_lengths_B, overrides, qs, mech)
    stopped = _stopped_by(qs, layers, eligible_B)
    granule = max(GRANULE, width // 128)

    def slots(count: int) -> int:
        return min(-(-count // granule) * granule, width)

    def left(layer: int) -> int:
        """Most tokens of a row that compute after a layer."""
        return int((padded.lengths_B - _after(stopped, layer)).max())

    keeps = _keeps_keys(qs, overrides)
    if _counted(qs, overrides):
        begins = [width, *(slots(left(end)) for end in ends[:-1])][: len(ends)]
        fills = []
        for begin, end in zip(first, ends, strict=True):
            since = 1 if qs.amq is not None and end == qs.amq.layer else begin
            gone_B = _after(stopped, end) - _after(stopped, since - 1)
            fills.append(slots(int(np.max(gone_B))))
        light = qs.halting is not None and qs.halting.light_from is not None
        if light:  # the second segment's whole tokens are those that never stop
            begins[1] = slots(left(ends[1]))
            if _forces(qs, overrides):  # such tokens are never left whole
                fills[1] = slots(int(eligible_B.max()))
        stopping = fills[1] if light else 0
        plan = Plan(tuple(begins), True, tuple(fills), keeps_keys=keeps, light=stopping)
    else:
        step = max(SMALLEST_STEP, -(-width // STEPS))
        choices = {slots(left(layer)) for layer in stopped} | {width}
        choices |= {slots(step * k) for k in range(1, STEPS + 1)}
        part = math.ceil(layers / SEGMENTS)  # few values, so that sweeps share programs
        longest = max((b - a + 1 for a, b in zip(first[1:], ends[1:], strict=True)), default=1)
        longest = min(math.ceil(longest / part) * part, layers)
        plan = Plan(tuple(sorted(choices)), False, longest=longest, keeps_keys=keeps)
    bounds = (jnp.asarray(np.array(layer, np.int32)) for layer in (first, ends))
    return plan, Segments(*bounds)


def _counted(qs: QuickSilverConfig, overrides: Overrides | None) -> bool:
    """How many tokens compute is known beforehand: only quotas stop them."""
    if qs.halting is not None and qs.halting.light_from is not None:
        return True  # a forced halt can only be where all of them stop
    quotas = qs.halting is None or qs.halting.rule == "quota"
    return qs.fusion is None and quotas and not _forces(qs, overrides)


def _forces(qs: QuickSilverConfig, overrides: Overrides | None) -> bool:
    """Whether a token may be made to halt."""
    asked = overrides is not None and bool(np.any(overrides.forced_layer_BT < NEVER))
    return asked or (qs.halting is not None and bool(qs.halting.forced_ids))


def _ends(qs: QuickSilverConfig, layers: int, overrides: Overrides | None) -> list[int]:
    """Last layer of each segment, up to the last layer but one."""
    ends, halting = {layers - 1}, qs.halting

    def cut_from(layer: int) -> set[int]:
        return set(range(layer, layers, math.ceil((layers - layer) / SEGMENTS) or 1))

    if halting is not None:
        if halting.light_from is not None:
            ends.add(halting.light_from - 1)
        allowed = (np.flatnonzero(halting.may_halt(layers)) + 1).tolist()
        if halting.layers is not None:
            ends |= set(allowed)
        elif allowed:
            ends |= cut_from(allowed[0])
        forced = {halting.forced_layer} if halting.forced_layer is not None else set()
        if overrides is not None:
            found = np.unique(overrides.forced_layer_BT)
            forced |= set(found[found < NEVER].tolist())
        # A quota decides at the ends of segments only.
        few = len(forced) <= SEGMENTS or halting.rule == "quota"
        ends |= forced if few else cut_from(min(forced))
    if qs.fusion is not None:  # absorbed tokens stop
        ends |= cut_from(max(qs.fusion.first_layer, 1))
    if qs.amq is not None:
        ends.add(qs.amq.layer)
    return sorted(end for end in ends if 1 <= end < layers)


def _keeps_keys(qs: QuickSilverConfig, overrides: Overrides | None) -> bool:
    """Whether stopped tokens may have keys in deeper layers."""
    skip = qs.kv_skip
    if qs.halting is None:
        return False
    if skip is None or skip.policy != "skip" or skip.delay > 0 or skip.retain_ids:
        return True
    return overrides is not None and bool(np.any(overrides.retain_BT))


def _eligible(
    padded: Batch,
    prompt_lengths_B: np.ndarray,
    overrides: Overrides | None,
    qs: QuickSilverConfig,
    mech: Mechanisms,
) -> np.ndarray:
    """Tokens of each prompt that may stop, as `Mechanisms.rows` chooses them; int `[B]`."""
    pos_1T = np.arange(padded.tokens_BT.shape[1])[None]
    ends_B1 = (prompt_lengths_B - qs.recent_of(prompt_lengths_B))[:, None]
    may_BT = (pos_1T >= qs.sink_tokens) & (pos_1T < ends_B1)
    may_BT &= ~np.isin(padded.tokens_BT, [*mech.special_ids, *qs.protect_ids])
    if overrides is not None:
        may_BT &= ~np.asarray(overrides.full_BT)
    return may_BT.sum(1)


def _stopped_by(
    qs: QuickSilverConfig, layers: int, eligible_B: np.ndarray
) -> dict[int, np.ndarray]:
    """Tokens of each row that a quota has stopped after each of its layers."""
    halting = qs.halting
    if halting is None or halting.rule != "quota":
        return {}
    allowed = halting.may_halt(layers)
    return {
        layer: np.floor(share * halting.light_share * eligible_B + 1e-3).astype(int)
        for layer, share in zip(halting.layers or (), halting.quota, strict=True)
        if allowed[layer - 1]
    }


def _after(stopped: dict[int, np.ndarray], layer: int) -> np.ndarray:
    """Tokens that have stopped after a layer."""
    return max(
        (gone for at, gone in stopped.items() if at <= layer), key=np.sum, default=np.array(0)
    )
