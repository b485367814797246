"""Token generation: a prompt, then a loop over tokens, on the fast engines or on the masked one.

The fast engines run prefill, packing and the loop as separate programs. The masked engine scores
the row so far for every new token: slow, and what the others are tested against. `stream` runs the
same pieces, one call a token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import Config, ModelConfig
from qs_jax.engine import devices as on_devices
from qs_jax.engine import inputs, sampling, speculate
from qs_jax.engine.devices import Devices
from qs_jax.engine.fast import Fast, Request
from qs_jax.engine.inputs import TokenOverrides
from qs_jax.engine.prompt_plan import refusal, runs_fast
from qs_jax.engine.score import run_masked
from qs_jax.engine.weights import check_finite, prepare_params
from qs_jax.errors import ConfigError
from qs_jax.jax_settings import default_settings
from qs_jax.mechanisms import Mechanisms, Overrides, resolve
from qs_jax.models import Params, head
from qs_jax.record import Record, decided
from qs_jax.state import NEVER, Decisions, evidence


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns; B rows, M = max_new_tokens columns.

    Attributes:
      tokens: int32 `[B, M]`, the new tokens only, the end token included; padding after it.
      lengths: int32 `[B]`, new tokens of each row.
      logprobs: float32 `[B, M]`, log-probability of each new token as the model ran, before
        temperature, filters and penalties, in nats; 0 in the padding.
      prompt_tokens: int32 `[B, T]`, the right-padded prompts.
      prompt_lengths: int32 `[B]`.
      record: What the mechanisms did to every token that was run: the prompt and all new tokens but
        the last of each row. None for the dense model.
      passes: int32 `[B]`, steps in which the row ran after its prompt; one a token, unless drafts
        were kept.
      drafted: int32 `[B]`, drafted tokens that were verified (`Config.speculate`).
      accepted: int32 `[B]`, those that were kept.
      kv_bytes: Bytes the KV cache took at the end of the call, which is its largest size. The
        prompt's own full cache, which the decode engine packs and frees after prefill, is not in
        it.
    """

    tokens: Int[np.ndarray, "B M"]
    lengths: Int[np.ndarray, "B"]
    logprobs: Float[np.ndarray, "B M"]
    prompt_tokens: Int[np.ndarray, "B T"]
    prompt_lengths: Int[np.ndarray, "B"]
    passes: Int[np.ndarray, "B"]
    drafted: Int[np.ndarray, "B"]
    accepted: Int[np.ndarray, "B"]
    record: Record | None = None
    kv_bytes: int = 0

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and continuation of each row, without padding."""
        return [
            self.prompt_tokens[row, : self.prompt_lengths[row]].tolist()
            + self.tokens[row, : self.lengths[row]].tolist()
            for row in range(len(self.tokens))
        ]


@dataclasses.dataclass(frozen=True)
class StreamStep:
    """One token a row.

    Attributes:
      tokens: int32 `[B]`; the pad id for rows that had ended before.
      logprobs: float32 `[B]`, as in `GenerateOutput`.
      is_new: bool `[B]`, the row produced a token in this step.
      done: bool `[B]`, the row has ended.
      passes, drafted, accepted: int32 `[B]`, as in `GenerateOutput`, so far.
    """

    tokens: Int[np.ndarray, "B"]
    logprobs: Float[np.ndarray, "B"]
    is_new: Bool[np.ndarray, "B"]
    done: Bool[np.ndarray, "B"]
    passes: Int[np.ndarray, "B"]
    drafted: Int[np.ndarray, "B"]
    accepted: Int[np.ndarray, "B"]


def _prepare(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    lengths: Any,
    attention_mask: Any,
    overrides: TokenOverrides | None,
    devices: Devices | None,
) -> _Masked | Fast:
    model, mech = cfg.model, resolve(cfg.quicksilver, cfg.model, cfg.effective_protocol)
    mesh = None if devices is None else on_devices.as_mesh(devices)
    params = prepare_params(params, model, mech, mesh)
    given = {"lengths": lengths, "attention_mask": attention_mask}
    batch, padded = inputs.prepare_batch(tokens, model, new_tokens=cfg.max_new_tokens, **given)
    shape, width = padded.tokens_BT.shape, batch.tokens_BT.shape[1]
    chosen = inputs.override_arrays(overrides, shape, width, cfg)
    plan, numbers = sampling.plan_of(cfg, inputs.bucket_size(cfg.max_new_tokens))
    request = Request(params, batch, padded, chosen, mech, numbers, plan, cfg, mesh)
    if runs_fast(cfg, generates=True):
        return Fast(request)
    if cfg.speculate is not None:
        reason = refusal(cfg, generates=True) or "engine 'masked' keeps no cache"
        raise ConfigError(f"speculate needs the fast engines: {reason}.")
    return _Masked(request)


@default_settings()
def generate(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    attention_mask: Any = None,
    overrides: TokenOverrides | None = None,
    devices: Devices | None = None,
) -> GenerateOutput:
    """Continue every row until an end token or `cfg.max_new_tokens`.

    A row's result depends neither on padding nor on the other rows.

    Args:
      params: From `qs_jax.load`.
      tokens: int `[B, T]`, one row `[T]`, or rows of different lengths.
      cfg: Model, mechanisms and their protocol, budget and sampling.
      lengths: `[B]` valid tokens of each right-padded row.
      attention_mask: `[B, T]`, true for real tokens; left or right padding.
      overrides: Of single tokens of the prompts, whatever their signals.
      devices: Split rows and parameters over a mesh from `qs_jax.make_mesh`, or rows over a
        sequence of devices. Parameters that are not there are copied at every call; `qs_jax.shard`
        does it once.

    Returns:
      The new tokens, their count and log-probabilities, and the record of the mechanisms.

    Raises:
      ConfigError: The parameters are another model's, the maps a policy needs are missing, or
        `devices` is a mesh with other axes.
      InputError: Tokens cannot be used, or prompt + budget exceed the position limit.
      NonFiniteError: The model produced NaN or infinite logits.
    """
    engine = _prepare(params, tokens, cfg, lengths, attention_mask, overrides, devices)
    rows = len(engine.call.batch.lengths_B)
    text, found = on_devices.first_rows(jax.device_get(engine.finish()), rows)
    check_finite(text.finite_B)
    call, record = engine.call, None
    if found is not None:
        ran_B = call.batch.lengths_B + np.maximum(text.lengths_B - 1, 0)
        if isinstance(found, Decisions):
            assert cfg.quicksilver is not None
            found = decided(found, cfg.quicksilver, cfg.model.num_layers, ran_B)
        counted = (int(ran_B.max()), ran_B, call.batch.lengths_B, cfg.effective_protocol)
        told = {"simulated": isinstance(engine, _Masked), "quicksilver": cfg.quicksilver}
        record = Record.of(found, *counted, **told)
    return GenerateOutput(
        tokens=text.tokens_BM[:, : cfg.max_new_tokens],
        lengths=text.lengths_B,
        logprobs=text.logprobs_BM[:, : cfg.max_new_tokens],
        prompt_tokens=call.batch.tokens_BT,
        prompt_lengths=call.batch.lengths_B,
        **jax.device_get(on_devices.first_rows(engine.counts(text.lengths_B), rows)),
        record=record,
        kv_bytes=engine.kv_bytes,
    )


@default_settings()
def stream(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    attention_mask: Any = None,
    overrides: TokenOverrides | None = None,
    devices: Devices | None = None,
) -> Iterator[StreamStep]:
    """`generate`, one token a row at a time: same arguments, same tokens.

    Input is checked by the call itself, before the first step is asked for.

    Returns:
      An iterator that ends when every row has ended or the budget is used up.

    Raises:
      InputError: As `generate`.
      NonFiniteError: As `generate`, while iterating.
    """
    return _steps(_prepare(params, tokens, cfg, lengths, attention_mask, overrides, devices))


def _steps(engine: _Masked | Fast) -> Iterator[StreamStep]:
    told_B = np.zeros(len(engine.call.batch.lengths_B), np.int32)
    budget, ended_B = engine.call.cfg.max_new_tokens, told_B > 0
    while not (ended_B | (told_B >= budget)).all():
        with default_settings():  # not around the yield, where the caller's code runs
            text = on_devices.first_rows(engine.advance(), len(told_B))
            facts = (text.lengths_B, text.done_B, text.finite_B)
            lengths_B, done_B, finite_B = jax.device_get(facts)
            new = _columns(text.tokens_BM, text.logprobs_BM, told_B, engine.width)
            counts = on_devices.first_rows(engine.counts(lengths_B), len(told_B))
            (tokens_BT, logprobs_BT), counts = jax.device_get((new, counts))
        check_finite(finite_B)
        for at in range(int((lengths_B - told_B).max())):
            is_new_B = told_B < lengths_B
            told_B = told_B + is_new_B
            ended_B = done_B & (told_B == lengths_B)
            token_B = np.where(is_new_B, tokens_BT[:, at], engine.call.plan.pad_id)
            logprob_B = np.where(is_new_B, logprobs_BT[:, at], 0)
            yield StreamStep(token_B, logprob_B, is_new_B, ended_B, **counts)


@functools.partial(jax.jit, static_argnames="width")
def _columns(tokens_BM: Array, logprobs_BM: Array, first_B: Array, width: int):
    """What each row produced from its `first_B` on."""
    at_BT = jnp.minimum(first_B[:, None] + jnp.arange(width)[None], tokens_BM.shape[1] - 1)
    return tuple(jnp.take_along_axis(each, at_BT, axis=1) for each in (tokens_BM, logprobs_BM))


# --- by the definition --------------------------------------------------------------------------


class _Masked:
    """Generation by scoring the rows so far."""

    kv_bytes = 0  # it keeps no cache
    width = 1

    def __init__(self, call: Request) -> None:
        self.call, more = call, call.plan.capacity

        def widen(array: Any, value: Any) -> Any:
            wide = np.pad(array, ((0, 0), (0, more)), constant_values=value)
            return on_devices.put_rows(wide, call.mesh)

        self.tokens, self.overrides = widen(call.padded.tokens_BT, 0), None
        if call.overrides is not None:
            self.overrides = Overrides(*map(widen, call.overrides, (False, NEVER, False)))
        self.text: Any = None
        self.evidence: Any = None

    def advance(self) -> sampling.Text:
        """One more token a row."""
        call = self.call
        lengths_B = on_devices.put_rows(call.padded.lengths_B, call.mesh)
        given = (self.tokens, lengths_B, self.overrides, self.text)
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


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def _rescore(
    params: Params,
    tokens_BS: Array,
    prompt_lengths_B: Array,
    overrides: Overrides | None,
    text: sampling.Text | None,
    mech: Mechanisms,
    numbers: sampling.Numbers,
    model: ModelConfig,
    plan: sampling.Plan,
):
    """Append each live row's last token, run the rows, and choose the next tokens."""
    rows_B = jnp.arange(len(tokens_BS))
    tokens_BS, lengths_B = jnp.asarray(tokens_BS), jnp.asarray(prompt_lengths_B)
    if text is not None:
        at_B = jnp.where(text.done_B, NEVER, text.pos_B)
        tokens_BS = tokens_BS.at[rows_B, at_B].set(text.last_B, mode="drop")
        text = text.replace(pos_B=text.pos_B + ~text.done_B)
        lengths_B = text.pos_B
    batch = inputs.Batch(tokens_BS, lengths_B)
    rows = inputs.whole_rows(batch, prompt_lengths_B, overrides, mech)
    h_BTD, state, record = run_masked(params, rows, model, mech)
    logits_BV = head.logits(params, h_BTD[rows_B, lengths_B - 1])
    if text is None:
        text = sampling.begin(tokens_BS, lengths_B, logits_BV, numbers, plan)
    else:
        text = sampling.emit(text, logits_BV, ~text.done_B, numbers, plan)
    return tokens_BS, text, evidence(state, record)
