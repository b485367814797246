"""What the mechanisms did, token by token and layer by layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from qs_jax.config import ModelConfig, QuickSilverConfig
from qs_jax.state import FULL_BITS, NEVER, Decisions, Evidence, LayerRecord


@dataclasses.dataclass(frozen=True)
class Record:
    """Evidence of one call: L layers, B rows, T positions. Padding counts as inactive.

    Row l - 1 of a layer axis is layer l.

    Attributes:
      active: The token ran this layer.
      kv_written: Its keys and values were written at this layer.
      kv_held: And are still needed after the last token.
      visible_keys: Keys its query could see, itself included; 0 where inactive.
      bits: Of its activations in this layer; 16 is not quantised.
      fused: Position of its representative in this layer, its own where it has none.
      drift: Layer drift; nan where not computed.
      entropy: What the halting decision read, in nats; nan where it read none.
      weighed: It took part in a fusion at the end of this layer.
      depth: Layers the token ran before it halted; L if it did not.
      representative: As `fused`, after the last layer.
      lengths: Tokens of each row.
      prompt_lengths: Tokens of its prompt; 0 where rows were scored teacher-forced.
      protocol: "teacher-forced" or "continuation".
      simulated: The masked engine ran it: every token was computed, the decisions only selected.
      recent_tokens: Last tokens of each prompt that were exempt, by its length
        (`QuickSilverConfig.recent_of`); None where every token counts as new.
    """

    active: Bool[np.ndarray, "L B T"]
    kv_written: Bool[np.ndarray, "L B T"]
    kv_held: Bool[np.ndarray, "L B T"]
    visible_keys: Int[np.ndarray, "L B T"]
    bits: Int[np.ndarray, "L B T"]
    fused: Int[np.ndarray, "L B T"]
    drift: Float[np.ndarray, "L B T"]
    entropy: Float[np.ndarray, "L B T"]
    weighed: Bool[np.ndarray, "L B T"]
    depth: Int[np.ndarray, "B T"]
    representative: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B"]
    prompt_lengths: Int[np.ndarray, "B"]
    protocol: str = "teacher-forced"
    simulated: bool = True
    recent_tokens: Int[np.ndarray, "B"] | None = None

    @property
    def subject(self) -> Bool[np.ndarray, "B T"]:
        """Tokens the mechanisms look at: under "continuation" those of the prompt."""
        if self.protocol != "continuation":
            return self.real
        return np.arange(self.depth.shape[1])[None] < self.prompt_lengths[:, None]

    @property
    def real(self) -> Bool[np.ndarray, "B T"]:
        """True where a row has a token."""
        return np.arange(self.depth.shape[1])[None] < self.lengths[:, None]

    @property
    def layer_tokens_saved(self) -> float:
        """Share of (layer, token) pairs that were not needed."""
        return 1 - float(self.active.sum()) / (len(self.active) * float(self.lengths.sum()))

    @classmethod
    def of(
        cls,
        evidence: Evidence,
        width: int,
        lengths: np.ndarray,
        prompt_lengths: np.ndarray,
        protocol: str,
        simulated: bool = True,
        quicksilver: QuickSilverConfig | None = None,
    ) -> Record:
        """Build from a program's arrays, cut to `width` positions and emptied in the padding."""
        layers = evidence.layers
        real = np.arange(width)[None] < lengths[:, None]

        def cut(array: Any) -> np.ndarray:
            return np.asarray(array)[..., :width]

        recent = None
        if quicksilver is not None and protocol == "continuation":
            recent = quicksilver.recent_of(prompt_lengths)
        active, written = cut(layers.active_BT) & real, cut(layers.written_BT) & real
        layer_number = np.arange(1, len(active) + 1)[:, None, None]
        after = cut(evidence.fused_after_BT)
        absorbed = np.where(after < NEVER, cut(evidence.fused_BT), NEVER)
        return cls(
            active=active,
            kv_written=written,
            kv_held=written & (layer_number <= after),
            visible_keys=np.where(active, cut(layers.visible_BT), 0),
            bits=cut(layers.bits_BT),
            fused=resolve(cut(layers.fused_BT)),
            drift=np.where(active, cut(layers.drift_BT), np.nan),
            entropy=np.where(real, cut(layers.entropy_BT), np.nan),
            weighed=cut(layers.weighed_BT) & real,
            depth=np.where(real, cut(evidence.depth_BT), 0),
            representative=resolve(absorbed),
            lengths=lengths,
            prompt_lengths=prompt_lengths,
            protocol=protocol,
            simulated=simulated,
            recent_tokens=recent,
        )


def resolve(absorber: Int[np.ndarray, "*batch T"]) -> Int[np.ndarray, "*batch T"]:
    """Each token's representative, itself if it has none: follows absorber to absorber.

    An absorber at or past T is none. The result is idempotent, and never before the token.
    """
    width = absorber.shape[-1]
    positions = np.broadcast_to(np.arange(width), absorber.shape)
    fused = np.where(absorber < width, absorber, positions)
    while True:
        further = np.take_along_axis(fused, fused, axis=-1)
        if (further == fused).all():
            return fused
        fused = further


def written_keys(
    decisions: Decisions, qs: QuickSilverConfig | None, num_layers: int, lengths: np.ndarray
) -> Bool[np.ndarray, "L B S"]:
    """Where a token's keys and values are written: no layer after a fusion; few after a halt.

    Only the policy "skip" leaves out those of a halted token. Nothing is written in the padding.
    """
    read = (decisions.depth_BT, decisions.fused_after_BT, decisions.retain_BT)
    depth, absorbed_after, retain = map(np.asarray, read)
    layer = np.arange(1, num_layers + 1)[:, None, None]
    real = np.arange(depth.shape[1])[None] < lengths[:, None]
    written = real & (layer <= absorbed_after)
    skip = qs.kv_skip if qs is not None else None
    if skip is not None and skip.policy == "skip":
        written &= (layer <= depth + skip.delay) | retain
    return written


def decided(
    decisions: Decisions, qs: QuickSilverConfig, model: ModelConfig, lengths: np.ndarray
) -> Evidence:
    """Evidence of what a fast engine decided: the definition's arithmetic, after the fact.

    Decisions are host arrays over `[B, S]`, S at least the longest row.
    """
    depth, absorbed_after = np.asarray(decisions.depth_BT), np.asarray(decisions.fused_after_BT)
    signals = [decisions.drift_LBT, decisions.entropy_LBT]
    layer = np.arange(1, model.num_layers + 1)[:, None, None]
    real = np.arange(depth.shape[1])[None] < lengths[:, None]
    active = real & (layer <= absorbed_after) & (layer <= depth)
    written = written_keys(decisions, qs, model.num_layers, lengths)
    total = np.cumsum(written, axis=2)
    before = total - written
    if (window := model.sliding_window) is not None:
        before[:, :, window:] -= total[:, :, :-window]
    since = qs.amq.layer if qs.amq is not None else NEVER
    now = (layer == absorbed_after) & real
    rows, columns = np.nonzero(absorbed_after < NEVER)
    absorbing = np.zeros_like(now)
    absorber, after = decisions.fused_BT[rows, columns], absorbed_after[rows, columns]
    absorbing[after - 1, rows, absorber] = True
    drift, entropy = (np.full(active.shape, np.nan) if s is None else s for s in signals)
    fields: dict[str, Any] = {
        "active_BT": active,
        "written_BT": written,
        "visible_BT": before + 1,
        "bits_BT": np.where(layer > since, decisions.bits_BT, FULL_BITS),
        "fused_BT": np.where(layer > absorbed_after, decisions.fused_BT, NEVER),
        "drift_BT": drift,
        "entropy_BT": entropy,
        "weighed_BT": now | absorbing,
    }
    ends: Any = (depth, decisions.fused_BT, absorbed_after)
    return Evidence(LayerRecord(**fields), *ends)
