"""The host's side of every call: check and right-pad tokens and overrides of single tokens.

Programs compile once per shape, so prompt lengths and token budgets are rounded up to buckets:
four to an octave, which pads by at most a quarter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias, no_type_check

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from qs_jax.config import Config, ModelConfig
from qs_jax.errors import InputError
from qs_jax.mechanisms import Mechanisms, Overrides, Rows
from qs_jax.state import NEVER

TokensLike: TypeAlias = Any  # [B, T] array, one row [T], or a sequence of rows of any lengths

SMALLEST_BUCKET = 16


@no_type_check
class Batch(NamedTuple):
    """Right-padded token rows, int32; columns at or past a row's length hold 0."""

    tokens_BT: Any
    lengths_B: Any


def bucket_size(n: int, limit: int | None = None) -> int:
    """The smallest of 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, ... to hold `n`, cut to `limit`."""
    size = SMALLEST_BUCKET
    if n > size:
        step = 1 << max((n - 1).bit_length() - 3, 0)
        size = -(-n // step) * step
    return size if limit is None else min(size, limit)


def make_batch(
    tokens: TokensLike, model: ModelConfig, *, lengths: Any = None, attention_mask: Any = None
) -> Batch:
    """Check the tokens a user gave, as for `generate`, and right-pad them to the longest row."""
    if lengths is not None and attention_mask is not None:
        raise InputError("give lengths or attention_mask, not both.")
    rows = _as_rows(tokens)
    if attention_mask is not None:
        rows = _rows_of_mask(rows, np.atleast_2d(_as_array("attention_mask", attention_mask)))
    elif lengths is not None:
        rows = _rows_of_lengths(rows, np.atleast_1d(_as_array("lengths", lengths)))
    lengths_B = np.array([row.size for row in rows], np.int32)
    tokens_BT = np.zeros((len(rows), lengths_B.max()), np.int32)
    for index, row in enumerate(rows):
        if row.size == 0:
            raise InputError(f"row {index} is empty: every prompt needs at least one token.")
        bad = row[(row < 0) | (row >= model.vocab_size)]
        if bad.size:
            raise InputError(
                f"row {index} holds token id {bad[0]}, outside the vocabulary of "
                f"{model.vocab_size}: was it made by another model's tokenizer?"
            )
        tokens_BT[index, : row.size] = row
    return Batch(tokens_BT, lengths_B)


def prepare_batch(
    tokens: TokensLike,
    model: ModelConfig,
    *,
    new_tokens: int = 0,
    lengths: Any = None,
    attention_mask: Any = None,
) -> tuple[Batch, Batch]:
    """The batch as given, as wide as its longest row, and the same padded to its bucket."""
    batch = make_batch(tokens, model, lengths=lengths, attention_mask=attention_mask)
    return pad_batch(batch, model, new_tokens)


def pad_batch(batch: Batch, model: ModelConfig, new_tokens: int = 0) -> tuple[Batch, Batch]:
    """The batch, and the same padded to its bucket; there must be positions for new tokens."""
    width = batch.tokens_BT.shape[1]
    check_positions(width, new_tokens, model)
    extra = bucket_size(width, model.max_positions) - width
    return batch, Batch(np.pad(batch.tokens_BT, ((0, 0), (0, extra))), batch.lengths_B)


def split_prompts(lengths_B: np.ndarray, prompt_lengths: Any, cfg: Config) -> np.ndarray:
    """Tokens of each row's prompt, which "continuation" acts on and does not score; int32 `[B]`."""
    if cfg.effective_protocol != "continuation":
        if prompt_lengths is not None:
            raise InputError("prompt_lengths is for protocol 'continuation'.")
        return np.zeros(len(lengths_B), np.int32)
    if prompt_lengths is None:
        if lengths_B.min() <= cfg.continuation_tokens:
            raise InputError(
                f"a row of {lengths_B.min()} tokens has no prompt before its last "
                f"{cfg.continuation_tokens}: give prompt_lengths, or lower continuation_tokens."
            )
        return lengths_B - np.int32(cfg.continuation_tokens)
    ends_B = np.atleast_1d(_as_array("prompt_lengths", prompt_lengths))
    if ends_B.shape != lengths_B.shape or not np.issubdtype(ends_B.dtype, np.integer):
        raise InputError(f"prompt_lengths must be {len(lengths_B)} integers.")
    if ((ends_B < 1) | (ends_B >= lengths_B)).any():
        raise InputError("each of prompt_lengths must leave at least one token on both sides.")
    return ends_B.astype(np.int32)


def check_positions(longest: int, new_tokens: int, model: ModelConfig) -> None:
    """Refuse prompt and new tokens that together exceed `max_positions`, or what int32 counts."""
    limit = min(model.max_positions, NEVER)
    if longest + new_tokens <= limit:
        return
    what = f"{longest} prompt tokens" + (f" + {new_tokens} new tokens" if new_tokens else "")
    message = f"{what} exceed this model's {limit} positions: shorten the text"
    message += " or lower max_new_tokens." if new_tokens else "."
    if model.rope_scaling is not None and model.rope_scaling.rope_type == "dynamic":
        message += (
            " Its dynamic RoPE scaling would stretch further only by turning earlier keys anew, so"
            " that a later token would change earlier predictions."
        )
    raise InputError(message)


def _as_rows(tokens: TokensLike) -> list[np.ndarray]:
    if not hasattr(tokens, "ndim") and isinstance(tokens, Iterable):
        tokens = list(tokens)
        if tokens and all(isinstance(row, Iterable) for row in tokens):
            return [_as_ints(_as_array("tokens", row)) for row in tokens]
    array = _as_array("tokens", tokens)
    if array.shape[0:1] == (0,):
        raise InputError("the batch has no rows.")
    array = _as_ints(array, ranks=(1, 2))
    return list(array if array.ndim == 2 else array[None])


def _as_array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputError(f"{name} is not a regular array: {error}") from error


def _as_ints(array: np.ndarray, ranks: tuple[int, ...] = (1,)) -> np.ndarray:
    if array.ndim not in ranks:
        raise InputError(f"tokens must be [B, T] or rows of ids, got an array of {array.shape}.")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"tokens must be integers, got {array.dtype}: tokenize the text first.")
    return array.astype(np.int64)


def _rows_of_mask(rows: list[np.ndarray], mask: np.ndarray) -> list[np.ndarray]:
    if mask.shape != (len(rows), len(rows[0])) or any(row.size != rows[0].size for row in rows):
        raise InputError(
            f"attention_mask of shape {mask.shape} does not match the tokens' shape "
            f"({len(rows)}, {len(rows[0])})."
        )
    mask = mask.astype(bool)
    if (np.abs(np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8))).sum(1) > 2).any():
        raise InputError("attention_mask has a hole: rows may be padded on the left or the right.")
    return [row[kept] for row, kept in zip(rows, mask, strict=True)]


def _rows_of_lengths(rows: list[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    if lengths.shape != (len(rows),) or not np.issubdtype(lengths.dtype, np.integer):
        raise InputError(f"lengths must be {len(rows)} integers, got shape {lengths.shape}.")
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if not 0 <= length <= row.size:
            raise InputError(f"lengths[{index}] is {length}, but the row has {row.size} tokens.")
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def whole_rows(
    batch: Batch, prompt_lengths_B: Int[Array, "B"], overrides: Overrides | None, mech: Mechanisms
) -> Rows:
    """All tokens of a batch from position 0, with their exemptions; inside a program."""
    tokens_BT = jnp.asarray(batch.tokens_BT)
    pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    real_BT = pos_BT < batch.lengths_B[:, None]
    return mech.rows(tokens_BT, pos_BT, real_BT, prompt_lengths_B, overrides)


@no_type_check
@dataclasses.dataclass(frozen=True)
class TokenOverrides:
    """Overrides of single tokens; arrays over `[B, T]`, aligned with right-padded rows.

    Attributes:
      full_processing: bool: never halts, fuses, loses its keys or goes below 8 bits.
      forced_halt: int: layer at which the token halts at the latest; 0 for none.
      retain_kv: bool: its keys and values are always written.
    """

    full_processing: Any = None
    forced_halt: Any = None
    retain_kv: Any = None


@no_type_check
def override_arrays(
    overrides: TokenOverrides | None, shape: tuple[int, int], width: int, cfg: Config
) -> Overrides | None:
    """Arrays of a padded batch, `shape`, whose longest row has `width` tokens."""
    if overrides is None:
        return None
    if not isinstance(overrides, TokenOverrides):  # callers without a type checker
        raise InputError(f"overrides must be a qs_jax.TokenOverrides, got {type(overrides)}.")
    _refuse_no_effect(overrides, cfg)

    def fill(name: str, empty: Any, dtype: Any) -> np.ndarray:
        out = np.full(shape, empty, dtype)
        given = getattr(overrides, name)
        if given is None:
            return out
        array = np.atleast_2d(_as_array(f"overrides.{name}", given))
        fits = array.shape == (shape[0], width)
        if not fits or not (array.dtype == bool or np.issubdtype(array.dtype, np.integer)):
            raise InputError(
                f"overrides.{name} has shape {array.shape} and dtype {array.dtype}; expected one "
                f"integer or truth value for each token, ({shape[0]}, {width})."
            )
        out[:, : array.shape[1]] = array
        return out

    forced = fill("forced_halt", 0, np.int32)
    return Overrides(
        full_BT=fill("full_processing", False, bool),
        forced_layer_BT=np.where(forced > 0, forced, NEVER).astype(np.int32),
        retain_BT=fill("retain_kv", False, bool),
    )


def widen_overrides(overrides: Overrides, width: int) -> Overrides:
    """Overrides with nothing said about further tokens."""
    more = ((0, 0), (0, max(width - overrides.full_BT.shape[1], 0)))
    pairs = zip(overrides, (False, NEVER, False), strict=True)
    return Overrides(*(np.pad(array, more, constant_values=empty) for array, empty in pairs))


def _refuse_no_effect(overrides: TokenOverrides, cfg: Config) -> None:
    qs, deepest = cfg.quicksilver, cfg.model.num_layers - 1
    if qs is None or qs.is_off:
        raise InputError("overrides have no effect: every mechanism is off.")
    policy = qs.kv_skip.policy if qs.kv_skip is not None else None
    by_layer = qs.kv_skip is not None and qs.kv_skip.reads_frozen
    if overrides.forced_halt is not None:
        if qs.halting is None:
            raise InputError("overrides.forced_halt has no effect: halting is off.")
        layers = np.unique(_as_array("overrides.forced_halt", overrides.forced_halt))
        if not np.issubdtype(layers.dtype, np.integer):
            raise InputError("overrides.forced_halt must hold layer numbers, 0 for none.")
        mapped = qs.halting.layers or ()
        if by_layer and not set(layers[layers > 0].tolist()) <= set(mapped):
            raise InputError(
                f"overrides.forced_halt holds layers {layers.tolist()}, but there are maps for "
                f"{mapped} only (halting.layers)."
            )
        largest = int(layers.max(initial=0))
        if largest > deepest:
            raise InputError(
                f"overrides.forced_halt holds layer {largest}: layers 1 to {deepest} leave any "
                "to save."
            )
    if overrides.retain_kv is not None and policy not in ("skip", "attended"):
        raise InputError("overrides.retain_kv has no effect: no keys are skipped.")
