"""Flags for tokens that a preset hurts, and token ids to protect (paper R.1, R.3, B.5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from qs_jax.config import Config
from qs_jax.diagnostics.diagnosis import Diagnosis
from qs_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Flags:
    """Tokens over a threshold; the paper flags "high drift or attribution" and gives no number.

    Attributes:
      by_drift: Semantic drift index of the last layer above `drift_threshold`.
      by_attribution: Error attribution score above `attribution_threshold`.
      drift_threshold: In the units of the index.
      attribution_threshold: In nats per unit of the embedding.
    """

    by_drift: Bool[np.ndarray, "B T"]
    by_attribution: Bool[np.ndarray, "B T"]
    drift_threshold: float
    attribution_threshold: float

    @property
    def either(self) -> Bool[np.ndarray, "B T"]:
        """Flagged by one of the two at least."""
        return self.by_drift | self.by_attribution


def flag(diagnosis: Diagnosis, *, percentile: float = 95.0) -> Flags:
    """Flag tokens whose index or score is above a percentile of all tokens of the text.

    Args:
      diagnosis: Of `diagnose`.
      percentile: Threshold of both measures, between 0 and 100.

    Raises:
      InputError: The percentile is not between 0 and 100.
    """
    if not 0 <= percentile <= 100:
        raise InputError(f"the percentile must be between 0 and 100, got {percentile}.")
    real = diagnosis.record.real
    measures = (diagnosis.token_drift, diagnosis.attribution)
    taus = [float(np.percentile(values[real], percentile)) for values in measures]
    drift, attribution = (real & (x > tau) for x, tau in zip(measures, taus, strict=True))
    return Flags(drift, attribution, *taus)


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A token id that a preset should leave alone.

    Attributes:
      token: The id.
      count: Flagged occurrences that a mechanism touched.
      attribution: Their error attribution scores, added.
      drift: The largest of their semantic drift indices.
    """

    token: int
    count: int
    attribution: float
    drift: float

    def describe(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The suspect and its text in plain JSON types."""
        content = {"id": self.token, "text": tokenizer.decode([self.token]), "flagged": self.count}
        return content | {"attribution": self.attribution, "drift_index": self.drift}


def suggest_protect(
    diagnosis: Diagnosis, flags: Flags, cfg: Config, *, limit: int | None = 16
) -> list[Suspect]:
    """Ids of flagged tokens that a mechanism touched, the highest attribution first.

    A flagged token that no mechanism touched was hurt by others: protecting it would change
    nothing. Protection is by id, so it holds for every occurrence.

    Args:
      diagnosis: Of `diagnose`.
      flags: Of `flag`.
      cfg: The call diagnosed; ids it protects already are left out.
      limit: How many ids at most; None is all.
    """
    flagged = flags.either & diagnosis.touched
    known = set(cfg.quicksilver.protect_ids) if cfg.quicksilver is not None else set()
    suspects = []
    for token in set(diagnosis.tokens[flagged].tolist()) - known:
        here = flagged & (diagnosis.tokens == token)
        scores, drifts = diagnosis.attribution[here], diagnosis.token_drift[here]
        suspects.append(Suspect(token, int(here.sum()), float(scores.sum()), float(drifts.max())))
    suspects.sort(key=lambda suspect: (-suspect.attribution, -suspect.drift, suspect.token))
    return suspects[:limit]


def protected(cfg: Config, suspects: Sequence[Suspect], about: dict[str, Any]) -> Config:
    """The call with the suspects protected too; `about` goes into the preset's provenance."""
    assert cfg.quicksilver is not None
    ids = {*cfg.quicksilver.protect_ids, *(suspect.token for suspect in suspects)}
    provenance = dict(cfg.quicksilver.provenance) | {"protected": about}
    quicksilver = dataclasses.replace(
        cfg.quicksilver, protect_ids=tuple(sorted(ids)), provenance=provenance
    )
    return cfg.replace(quicksilver=quicksilver)


def describe(
    diagnosis: Diagnosis, flags: Flags, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The first row of a text, token by token and layer by layer, in plain JSON types."""
    record, ids = diagnosis.record, diagnosis.tokens[0]
    measures = {"drift": flags.by_drift, "attribution": flags.by_attribution}
    columns = {
        "id": ids,
        "layers_run": record.depth[0],
        "representative": record.representative[0],
        "bits": record.bits[:, 0].min(0),
        "touched": diagnosis.touched[0],
        "drift_index": diagnosis.token_drift[0],
        "relative_index": diagnosis.relative_index[-1, 0],
        "attribution": diagnosis.attribution[0],
        "scored": diagnosis.mask[0],
        "kl": diagnosis.kl[0],
    }
    tokens = [
        {
            "position": at,
            "text": tokenizer.decode([int(ids[at])]),
            **{name: values[at].item() for name, values in columns.items()},
            "flagged_by": [name for name, flagged_BT in measures.items() if flagged_BT[0, at]],
        }
        for at in range(int(diagnosis.lengths[0]))
    ]
    limits = {"drift_index": flags.drift_threshold, "attribution": flags.attribution_threshold}
    return {
        "summary": diagnosis.summary(),
        "thresholds": limits,
        "tokens": tokens,
        "drift_index": diagnosis.drift_index[:, 0].astype(float).tolist(),
        "relative_index": diagnosis.relative_index[:, 0].astype(float).tolist(),
        "simulated": True,
    }
