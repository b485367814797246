"""Token generation: a prompt, then a loop over tokens, on the fast engines or on the masked one.

The fast engines run prefill, packing and the loop as separate programs. The masked engine scores
the row so far for every new token: slow, and what the others are tested against. `stream` runs the
same pieces, one call a token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import Config
from qs_jax.engine import devices as on_devices
from qs_jax.engine import fast, inputs, prompt_cache, sampling
from qs_jax.engine.devices import Devices
from qs_jax.engine.fast import Fast
from qs_jax.engine.inputs import TokenOverrides
from qs_jax.engine.prompt_cache import PromptCache
from qs_jax.engine.prompt_plan import refusal, runs_fast
from qs_jax.engine.request import Request, continued_rows, new_rows, repeat_rows
from qs_jax.engine.rescore import Masked
from qs_jax.engine.stops import stop_table, stop_tokens
from qs_jax.engine.weights import check_finite, prepare_params
from qs_jax.errors import ConfigError, InputError
from qs_jax.jax_settings import default_settings
from qs_jax.mechanisms import Mechanisms, resolve
from qs_jax.models import Params
from qs_jax.record import Record, decided
from qs_jax.state import Decisions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
      cache: Of all tokens that were run, those but the last of each row; None unless asked for.
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
    cache: PromptCache | None = None

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


def _model_of(
    params: Params, cfg: Config, devices: Devices | None
) -> tuple[Params, Mechanisms, Mesh | None]:
    """Checked parameters where the call reads them, its mechanisms, and its mesh."""
    mech = resolve(cfg.quicksilver, cfg.model, cfg.effective_protocol)
    mesh = None if devices is None else on_devices.as_mesh(devices)
    return prepare_params(params, cfg.model, mech, mesh), mech, mesh


def _prepare(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    *,
    lengths: Any = None,
    attention_mask: Any = None,
    overrides: TokenOverrides | None = None,
    prompt_lengths: Any = None,
    cache: PromptCache | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    devices: Devices | None = None,
) -> Masked | Fast:
    params, mech, mesh = _model_of(params, cfg, devices)
    model, compact = cfg.model, runs_fast(cfg, generates=True)
    if cfg.speculate is not None and not compact:
        reason = refusal(cfg, generates=True) or "engine 'masked' keeps no cache"
        raise ConfigError(f"speculate needs the fast engines: {reason}.")
    table = None
    if cfg.stop:
        if tokenizer is None:
            raise ConfigError("Config.stop needs the text of tokens: give tokenizer=.")
        table = stop_table(tokenizer, cfg.stop, model.vocab_size)
        cfg = cfg.replace(eos_token_ids=(*cfg.stop_ids, *stop_tokens(tokenizer, cfg.stop)))
    given = inputs.make_batch(tokens, model, lengths=lengths, attention_mask=attention_mask)
    repeats = cfg.num_return_sequences
    if cache is None:
        rows = new_rows(given, cfg, prompt_lengths, overrides, repeats)
    else:
        if prompt_lengths is not None or overrides is not None:
            raise InputError("prompt_lengths and overrides belong to the call that made the cache.")
        cache.check(cfg)
        if compact and cache.caches is None:
            raise ConfigError("the cache is the masked engine's: pass generate the same engine.")
        cache = cache.rows(len(given.lengths_B), repeats)
        rows = continued_rows(cache, repeat_rows(given, repeats), cfg)
    if cache is None and compact and (rows.prompts_B < rows.batch.lengths_B).any():
        cache = fast.prefill(params, rows, mech, cfg, mesh)
    plan, numbers = sampling.plan_of(cfg, inputs.bucket_size(cfg.max_new_tokens), table)
    cache = cache if compact else None
    request = Request(params, *rows, mech, numbers, plan, cfg, cache, mesh)
    return Fast(request) if compact else Masked(request)


@default_settings()
def prefill(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    attention_mask: Any = None,
    overrides: TokenOverrides | None = None,
    devices: Devices | None = None,
) -> PromptCache:
    """Run prompts once, for calls of `generate` or `stream` that continue them with more tokens.

    Such a call gives what it would give for the whole rows, with `prompt_lengths` where the
    protocol is "continuation": the mechanisms act on the tokens given here, and all later ones run
    dense. The cache can be continued any number of times, and one row of it by many.

    Args:
      params: From `qs_jax.load`.
      tokens: int `[B, T]`, one row `[T]`, or rows of different lengths.
      cfg: Model, mechanisms and their protocol; the rest plays no part.
      lengths: `[B]` valid tokens of each right-padded row.
      attention_mask: `[B, T]`, true for real tokens; left or right padding.
      overrides: Of single tokens, whatever their signals.
      devices: As `generate`.

    Raises:
      ConfigError: As `generate`.
      InputError: Tokens cannot be used, or a row exceeds the position limit.
    """
    params, mech, mesh = _model_of(params, cfg, devices)
    given = inputs.make_batch(tokens, cfg.model, lengths=lengths, attention_mask=attention_mask)
    rows = new_rows(given, cfg.replace(max_new_tokens=1), None, overrides, 1)
    if runs_fast(cfg, generates=True):
        return fast.prefill(params, rows, mech, cfg, mesh)
    batch = rows.batch
    given = (batch.lengths_B, prompt_cache.cache_key(cfg), None, None, rows.overrides)
    return PromptCache(batch.tokens_BT, batch.lengths_B, *given)


@default_settings()
def generate(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    attention_mask: Any = None,
    overrides: TokenOverrides | None = None,
    prompt_lengths: Sequence[int] | np.ndarray | None = None,
    cache: PromptCache | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    return_cache: bool = False,
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
      prompt_lengths: `[B]`, "continuation" only: the first tokens of each row, on which the
        mechanisms act; by default all of them.
      cache: Of `prefill`, or of an earlier call: it holds the beginning of each row, and `tokens`
        are what follows. A cache of one row serves any number of them.
      tokenizer: Of the model, where `cfg.stop` has strings.
      return_cache: Also return the cache of all tokens that were run.
      devices: Split rows and parameters over a mesh from `qs_jax.make_mesh`, or rows over a
        sequence of devices. Parameters that are not there are copied at every call; `qs_jax.shard`
        does it once.

    Returns:
      The new tokens, their count and log-probabilities, and the record of the mechanisms. Rows are
      `cfg.num_return_sequences` times those given, those of a prompt together.

    Raises:
      ConfigError: The parameters are another model's, the maps a policy needs are missing, or
        `devices` is a mesh with other axes.
      InputError: Tokens cannot be used, or prompt + budget exceed the position limit.
      NonFiniteError: The model produced NaN or infinite logits.
    """
    engine = _prepare(
        params,
        tokens,
        cfg,
        lengths=lengths,
        attention_mask=attention_mask,
        overrides=overrides,
        prompt_lengths=prompt_lengths,
        cache=cache,
        tokenizer=tokenizer,
        devices=devices,
    )
    rows = len(engine.call.batch.lengths_B)
    text, found = on_devices.first_rows(jax.device_get(engine.finish()), rows)
    check_finite(text.finite_B)
    call, record = engine.call, None
    if found is not None:
        ran_B = call.batch.lengths_B + np.maximum(text.lengths_B - 1, 0)
        if isinstance(found, Decisions):
            assert cfg.quicksilver is not None
            found = decided(found, cfg.quicksilver, cfg.model, ran_B)
        counted = (int(ran_B.max()), ran_B, call.prompts_B, cfg.effective_protocol)
        told = {"simulated": isinstance(engine, Masked), "quicksilver": cfg.quicksilver}
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
        cache=_cache_of(engine, text.lengths_B) if return_cache else None,
    )


def _cache_of(engine: Masked | Fast, count_B: np.ndarray) -> PromptCache:
    """The prompts and so many new tokens of each row, but for the last, which was not run."""
    batch, text = engine.call.batch, jax.device_get(engine.text)
    lengths_B = (batch.lengths_B + count_B - 1).astype(np.int32)
    rows = zip(batch.tokens_BT, batch.lengths_B, text.tokens_BM, lengths_B, strict=False)
    whole = [[*old[:a].tolist(), *new.tolist()][:end] for old, a, new, end in rows]
    tokens_BT = inputs.make_batch(whole, engine.call.cfg.model).tokens_BT
    return engine.cache(tokens_BT, lengths_B)


@default_settings()
def stream(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    **arguments: Any,
) -> TokenStream:
    """`generate`, one token a row at a time: same arguments but `return_cache`, same tokens.

    Input is checked by the call itself, before the first step is asked for.

    Returns:
      An iterator that ends when every row has ended or the budget is used up.

    Raises:
      InputError: As `generate`.
      NonFiniteError: As `generate`, while iterating.
    """
    return TokenStream(_prepare(params, tokens, cfg, **arguments))


class TokenStream(Iterator[StreamStep]):
    """The steps of a call of `stream`."""

    def __init__(self, engine: Masked | Fast) -> None:
        self._engine, self._iterator = engine, _steps(engine)
        self._count_B = np.zeros(len(engine.call.batch.lengths_B), np.int32)

    def __next__(self) -> StreamStep:
        step = next(self._iterator)
        self._count_B = self._count_B + step.is_new
        return step

    def close(self) -> None:
        """End the stream."""
        self._iterator.close()

    @default_settings()
    def cache(self) -> PromptCache:
        """The prompts and the tokens of all steps so far but the last; it ends the stream."""
        if not self._count_B.all():
            raise InputError("the stream has not begun: ask it for a step first.")
        self.close()
        return _cache_of(self._engine, self._count_B)


def _steps(engine: Masked | Fast) -> Generator[StreamStep]:
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
