"""Drafts of the next tokens by prompt lookup, and when to verify them.

A draft is the continuation of the latest earlier occurrence of a row's last tokens. A step that
verifies drafts costs more than a plain one, so it runs only where enough drafted tokens are
expected to be kept. What a row expects follows from how often a looked-up token turned out right
lately, which plain steps find out as well: they compare the first token of a draft that was not
verified. Source: Saxena 2023, "Prompt lookup decoding"; the gate is ours.
"""

from __future__ import annotations

import functools
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.struct import field
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import Speculation
from qs_jax.engine.sampling import Text
from qs_jax.models import cpu
from qs_jax.state import NEVER

# What a lookup is taken for before the first: as often right as wrong, which counts as one try.
PRIOR = 0.5
# In place of a drafted token where a row has no draft: no row chooses it.
NOTHING = -1
# Weight of earlier tries for each later step.
FORGET = 0.9


@no_type_check
class Drafts(flax.struct.PyTreeNode):
    """What drafts are made of and were worth so far; G lengths of n-grams, K drafted tokens.

    Attributes:
      draft_BK: What may follow a row's last token; `NOTHING` where nothing was found.
      by_B: The n-gram that found the draft, by its place in `ngram`; G where there is none.
      wide: The next step verifies drafts.
      right_BG: Looked-up tokens that turned out right, the recent ones counting more.
      tried_BG: Looked-up tokens that were compared, weighted alike.
      passes_B: Steps in which the row ran.
      drafted_B: Tokens that were verified.
      accepted_B: Those that were kept.
      gate: Tokens that a row must expect.
    """

    draft_BK: Int[Array, "B K"]
    by_B: Int[Array, "B"]
    wide: Bool[Array, ""]
    right_BG: Float[Array, "B G"]
    tried_BG: Float[Array, "B G"]
    passes_B: Int[Array, "B"]
    drafted_B: Int[Array, "B"]
    accepted_B: Int[Array, "B"]
    gate: Float[Array, ""]
    length: int = field(pytree_node=False)
    ngram: tuple[int, ...] = field(pytree_node=False)
    exact: bool = field(pytree_node=False)

    @property
    def found_B(self) -> Bool[Array, "B"]:
        """Rows that have a draft."""
        return self.by_B < len(self.ngram)


def split(settings: Speculation | None, rows: int) -> tuple[Array | None, Speculation | None]:
    """The gate, and the settings that change the program; None twice where nothing is drafted."""
    if settings is None:
        return None, None
    gate = cpu.least_kept(rows) if settings.gate is None else settings.gate
    return jnp.float32(gate), settings.replace(gate=None)


def counts(drafts: Drafts | None, lengths_B: Any) -> dict[str, Any]:
    """Fields of `GenerateOutput`; without drafts every token but a row's first took a step."""
    if drafts is None:
        nothing_B = np.zeros(len(lengths_B), np.int32)
        return {"passes": np.maximum(lengths_B - 1, 0), "drafted": nothing_B, "accepted": nothing_B}
    names = ("passes", "drafted", "accepted")
    return {name: getattr(drafts, f"{name}_B") for name in names}


def begin(settings: Speculation, gate: Array, text: Text) -> Drafts:
    """Drafts after the first token of each row."""
    batch, length = len(text.last_B), settings.length
    tried_BG = jnp.ones((batch, len(settings.ngram)))
    nothing_B = jnp.zeros(batch, jnp.int32)
    drafts = Drafts(
        draft_BK=jnp.zeros((batch, length), jnp.int32),
        by_B=nothing_B,
        wide=jnp.zeros((), bool),
        right_BG=PRIOR * tried_BG,
        tried_BG=tried_BG,
        passes_B=nothing_B,
        drafted_B=nothing_B,
        accepted_B=nothing_B,
        gate=gate,
        length=length,
        ngram=settings.ngram,
        exact=settings.exact,
    )
    return propose(drafts, text)


def learn(drafts: Drafts, before: Text, after: Text, live_B: Array, width: int) -> Drafts:
    """Note what a step of `width` tokens produced, and what drafts were worth."""
    new_B = after.lengths_B - before.lengths_B
    rows_B1, at_1T = jnp.arange(len(new_B))[:, None], jnp.arange(width)[None]
    columns_BT = jnp.minimum(before.lengths_B[:, None] + at_1T, before.tokens_BM.shape[1] - 1)
    tokens_BT = after.tokens_BM[rows_B1, columns_BT]
    most = min(width, drafts.length)
    compared_BT = tokens_BT[:, :most] == drafts.draft_BK[:, :most]
    compared_BT &= at_1T[:, :most] < new_B[:, None]
    found_B = drafts.found_B & live_B
    right_B = jnp.where(found_B, compared_BT.cumprod(1).sum(1), 0)
    # The token after the kept ones was a draft's too, unless the draft or the row ended there.
    tried_B = jnp.where(found_B, jnp.minimum(new_B, drafts.length), 0)
    weight_BG = jax.nn.one_hot(drafts.by_B, len(drafts.ngram))
    forget_BG = jnp.where((found_B[:, None]) & (weight_BG > 0), FORGET, 1.0)
    verified_B = found_B if width > 1 else jnp.zeros_like(found_B)
    drafts = drafts.replace(
        right_BG=drafts.right_BG * forget_BG + weight_BG * right_B[:, None],
        tried_BG=drafts.tried_BG * forget_BG + weight_BG * tried_B[:, None],
        passes_B=drafts.passes_B + live_B,
        drafted_B=drafts.drafted_B + drafts.length * verified_B,
        accepted_B=drafts.accepted_B + jnp.where(verified_B, new_B - 1, 0),
    )
    return propose(drafts, after)


def propose(drafts: Drafts, text: Text) -> Drafts:
    """Look up what may follow each row's last token, and decide whether to verify it.

    The rows that are behind decide: a batch ends with its last row.
    """
    of_row = functools.partial(look_up, ngram=drafts.ngram, length=drafts.length)
    draft_BK, by_B = jax.vmap(of_row)(text.history_BS, text.pos_B)
    found_B1 = (by_B < len(drafts.ngram))[:, None]
    drafts = drafts.replace(draft_BK=jnp.where(found_B1, draft_BK, NOTHING), by_B=by_B)
    # A draft is kept up to its first wrong token.
    share_BG = drafts.right_BG / drafts.tried_BG
    share_B1 = jnp.take_along_axis(share_BG, by_B[:, None], axis=1, mode="clip")
    kept_B = (share_B1 ** (1 + jnp.arange(drafts.length))[None]).sum(1)
    least = jnp.where(text.done_B, NEVER, text.lengths_B).min()
    behind_B = ~text.done_B & (text.lengths_B == least)
    found_B = drafts.found_B & behind_B
    enough = jnp.where(found_B, kept_B, 0).sum() >= drafts.gate * behind_B.sum()
    return drafts.replace(wide=enough & found_B.any())


def look_up(
    history_S: Int[Array, "S"], last: Int[Array, ""], ngram: tuple[int, ...], length: int
) -> tuple[Int[Array, "K"], Int[Array, ""]]:
    """The tokens after the latest earlier occurrence of the last ones, and which n-gram it was.

    The draft of an occurrence that reaches up to the last tokens goes on in the same rhythm.

    Args:
      history_S: Tokens by position.
      last: Position of the last token.
      ngram: Lengths of what is looked up, in order of preference.
      length: K.
    """
    at_S = jnp.arange(len(history_S))
    same_S, ends = at_S < last, {}
    for back in range(max(ngram)):
        token = history_S[jnp.maximum(last - back, 0)]
        same_S &= (jnp.roll(history_S, back) == token) & (at_S >= back)
        ends[back + 1] = jnp.where(same_S, at_S, -1).max()
    found_G = jnp.stack([ends[size] for size in ngram])
    by = jnp.argmax(jnp.append(found_G >= 0, True)).astype(jnp.int32)
    end = jnp.append(found_G, 0)[by]
    rhythm = jnp.maximum(last - end, 1)
    return history_S[end + 1 + jnp.arange(length) % rhythm], by
