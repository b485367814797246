"""Generation by the definition: the rows so far are scored for every new token.

Slow, and what the fast engines are tested against.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qs_jax.config import ModelConfig
from qs_jax.engine import devices as on_devices
from qs_jax.engine import inputs, prompt_cache, sampling, speculate
from qs_jax.engine.prompt_cache import PromptCache
from qs_jax.engine.request import Request
from qs_jax.engine.score import run_masked
from qs_jax.mechanisms import Mechanisms, Overrides
from qs_jax.models import Params, head
from qs_jax.state import NEVER, evidence


class Masked:
    """Generation by scoring the rows so far."""

    kv_bytes = 0  # it keeps no cache
    width = 1

    def __init__(self, call: Request) -> None:
        self.call, self.overrides = call, None
        wide = np.pad(call.padded.tokens_BT, ((0, 0), (0, call.plan.capacity)))
        self.tokens = on_devices.put_rows(wide, call.mesh)
        if call.overrides is not None:
            width = self.tokens.shape[1]
            wider = inputs.widen_overrides(call.overrides, width)
            self.overrides = on_devices.put_rows(wider, call.mesh)
        self.text: Any = None
        self.evidence: Any = None

    def advance(self) -> sampling.Text:
        """One more token a row."""
        call = self.call
        lengths_B, prompts_B = on_devices.put_rows(
            (call.padded.lengths_B, call.prompts_B), call.mesh
        )
        given = (self.tokens, lengths_B, prompts_B, self.overrides, self.text)
        arrays = (call.params, *given, call.mech, call.numbers)
        out = _rescore(*arrays, model=call.cfg.model, plan=call.plan)
        self.tokens, self.text, self.evidence = out
        return self.text

    def finish(self) -> tuple[sampling.Text, Any]:
        """All tokens, and the evidence of their record."""
        for _ in range(self.call.cfg.max_new_tokens):
            if np.asarray(self.advance().done_B).all():
                break
        return self.text, self.evidence

    def counts(self, lengths_B: np.ndarray) -> dict[str, Any]:
        """Steps of each row, and its drafts."""
        return speculate.counts(None, lengths_B)

    def cache(self, tokens_BT: np.ndarray, lengths_B: np.ndarray) -> PromptCache:
        """The first so many tokens of each row, without keys and values: they are run anew."""
        call = self.call
        given = (call.prompts_B, prompt_cache.cache_key(call.cfg), None, None, call.overrides)
        return PromptCache(tokens_BT, lengths_B, *given)


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def _rescore(
    params: Params,
    tokens_BS: Array,
    lengths_B: Array,
    prompts_B: Array,
    overrides: Overrides | None,
    text: sampling.Text | None,
    mech: Mechanisms,
    numbers: sampling.Numbers,
    model: ModelConfig,
    plan: sampling.Plan,
):
    """Append each live row's last token, run the rows, and choose the next tokens."""
    rows_B = jnp.arange(len(tokens_BS))
    tokens_BS, lengths_B = jnp.asarray(tokens_BS), jnp.asarray(lengths_B)
    if text is not None:
        at_B = jnp.where(text.done_B, NEVER, text.pos_B)
        tokens_BS = tokens_BS.at[rows_B, at_B].set(text.last_B, mode="drop")
        lengths_B = text.pos_B + ~text.done_B
    batch = inputs.Batch(tokens_BS, lengths_B)
    rows = inputs.whole_rows(batch, prompts_B, overrides, mech)
    h_BTD, state, record = run_masked(params, rows, model, mech)
    logits_BV = head.logits(params, h_BTD[rows_B, lengths_B - 1])
    if text is None:
        text = sampling.begin(tokens_BS, lengths_B, logits_BV, numbers, plan)
    else:
        text = sampling.emit(text, logits_BV, ~text.done_B, numbers, plan)
    return tokens_BS, text, evidence(state, record)
