"""Log-probabilities of given text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import Config, ModelConfig
from qs_jax.engine import dense, inputs, masked, prompt
from qs_jax.engine import devices as on_devices
from qs_jax.engine.devices import Devices
from qs_jax.engine.inputs import TokenOverrides
from qs_jax.engine.prompt_call import Plan, Segments
from qs_jax.engine.prompt_plan import arrange, runs_fast
from qs_jax.engine.weights import check_finite, prepare_params
from qs_jax.jax_settings import default_settings
from qs_jax.mechanisms import Mechanisms, Overrides, Rows, resolve, signals
from qs_jax.models import Params, head
from qs_jax.record import Record, decided
from qs_jax.state import evidence, exact_dtype


@dataclasses.dataclass(frozen=True)
class ScoreOutput:
    """What `score` returns; columns are those of the tokens given.

    Attributes:
      logprobs: float32 `[B, T]`; column i is log p(token i | tokens before i) in nats; 0 where
        nothing is scored (the first token of a row, padding, the prompt under "continuation").
      mask: bool `[B, T]`, true where a position is scored.
      logits: float32 `[B, T, V]` if asked for; column i uses tokens 0..i, and predicts i + 1.
      states: `[B, T, D]` if asked for, in the model's dtype; column i is what the head reads after
        token i: the normed state of the last layer, or of the one the token halted at. The prompt
        engine has those before scored tokens only; zeros elsewhere.
      record: What the mechanisms did; None for the dense model.
    """

    logprobs: Float[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]
    logits: Float[np.ndarray, "B T V"] | None = None
    states: Float[np.ndarray, "B T D"] | None = None
    record: Record | None = None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the scored positions, in nats; nan if there are none."""
        count = self.mask.sum()
        return -float(self.logprobs.sum(dtype=np.float64) / count) if count else float("nan")

    @property
    def perplexity(self) -> float:
        """Exp of `nll`."""
        return float(np.exp(self.nll))


def next_logprobs(
    params: Params, h_BTD: Array, tokens_BT: Array, before_BN: Array | None = None
) -> Array:
    """Log-probability of each token, read from the normed state before it; column 0 is 0.

    With `before_BN`, only states after these positions are read; other columns are 0.
    """
    if before_BN is None:
        next_BT = jnp.roll(tokens_BT, -1, axis=1)
        return jnp.pad(_pick(params, h_BTD, next_BT)[:, :-1], ((0, 0), (1, 0)))
    h_BND = jnp.take_along_axis(h_BTD, before_BN[..., None], axis=1)
    return _placed(params, h_BND, tokens_BT, before_BN)


def _before(first_B: Array, count: int, width: int) -> Array:
    """Positions before the `count` scored ones of each row; spare columns read some twice."""
    before_BN = first_B[:, None] - 1 + jnp.arange(min(count, width), dtype=jnp.int32)[None]
    return jnp.clip(before_BN, 0, width - 2)


def _placed(params: Params, h_BND: Array, tokens_BT: Array, before_BN: Array) -> Array:
    """Log-probabilities of the tokens after some positions, from the states there."""
    found_BN = _pick(params, h_BND, jnp.take_along_axis(tokens_BT, before_BN + 1, axis=1))
    rows_B1 = jnp.arange(len(before_BN))[:, None]
    return jnp.zeros(tokens_BT.shape, found_BN.dtype).at[rows_B1, before_BN + 1].set(found_BN)


def _pick(params: Params, h_BTD: Array, next_BT: Array) -> Array:
    """Log-probability of `next_BT` after each state."""

    def chunk_logprobs(h_BCD: Array, next_BC: Array) -> Array:
        logits_BCV = head.logits(params, h_BCD)
        picked_BC = jnp.take_along_axis(logits_BCV, next_BC[..., None], axis=-1)[..., 0]
        return picked_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    vocab = head.head_table(params).shape[0]
    return head.map_positions(chunk_logprobs, vocab, h_BTD, next_BT)


def score_dense(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    first_B: Int[Array, "B"],
    model: ModelConfig,
    count: int,
    returns: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Log-probabilities of the dense model, of `count` positions a row from `first_B` on."""
    h_BTD = dense.forward(params, tokens_BT, model)
    return _outputs(params, h_BTD, tokens_BT, first_B, count, returns)


def _outputs(
    params: Params, h_BTD: Array, tokens_BT: Array, first_B: Array, count: int, returns: Any
) -> dict[str, Any]:
    width = tokens_BT.shape[1]
    before_BN = _before(first_B, count, width) if count < width else None
    out = {"logprobs": next_logprobs(params, h_BTD, tokens_BT, before_BN)}
    if "logits" in returns:
        out["logits"] = head.logits(params, h_BTD)
    return out | ({"states": h_BTD} if "states" in returns else {})


def score_masked(
    params: Params,
    batch: inputs.Batch,
    ends_B: Int[Array, "B"],
    first_B: Int[Array, "B"],
    overrides: Overrides | None,
    mech: Mechanisms,
    model: ModelConfig,
    count: int,
    returns: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Log-probabilities under the mechanisms, and the evidence of their record."""
    rows = inputs.whole_rows(batch, ends_B, overrides, mech)
    h_BTD, state, record = run_masked(params, rows, model, mech)
    out = _outputs(params, h_BTD, batch.tokens_BT, first_B, count, returns)
    return out | {"evidence": evidence(state, record)}


def score_prompt(
    params: Params,
    batch: inputs.Batch,
    ends_B: Int[Array, "B"],
    first_B: Int[Array, "B"],
    overrides: Overrides | None,
    mech: Mechanisms,
    segments: Segments,
    model: ModelConfig,
    plan: Plan,
    count: int,
    returns: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Log-probabilities of continuations, whose prompts the prompt engine runs."""
    rows = inputs.whole_rows(batch, ends_B, overrides, mech)
    before_BQ = _before(first_B, count, batch.tokens_BT.shape[1])
    h_BQD, _, decisions = prompt.run(params, rows, before_BQ, model, mech, plan, segments)
    logprobs_BT = _placed(params, h_BQD, batch.tokens_BT, before_BQ)
    out = {"logprobs": logprobs_BT, "decisions": decisions}
    if "states" in returns:  # those that are read; zeros elsewhere
        rows_B1 = jnp.arange(len(before_BQ))[:, None]
        empty_BTD = jnp.zeros((*batch.tokens_BT.shape, h_BQD.shape[-1]), h_BQD.dtype)
        out["states"] = empty_BTD.at[rows_B1, before_BQ].set(h_BQD)
    return out


def run_masked(params: Params, rows: Rows, model: ModelConfig, mech: Mechanisms):
    """`masked.run`, also where a decision reads the model's output one position earlier.

    Outputs of position i are final once those before it are: rows run until nothing changes.
    """
    if not mech.reads_previous:
        return masked.run(params, rows, model, mech)

    def entropy_before(h_BTD: Array) -> Array:
        def exact(h_BCD: Array) -> Array:
            return signals.entropy_of(head.logits(params, h_BCD))

        found_BT = head.map_positions(exact, model.vocab_size, h_BTD)
        return jnp.pad(found_BT[:, :-1], ((0, 0), (1, 0)), constant_values=jnp.inf)

    def again(carry):
        previous_BT, _ = carry
        found_BT = entropy_before(masked.run(params, rows, model, mech, previous_BT)[0])
        return found_BT, (rows.real_BT & (found_BT != previous_BT)).any()

    unknown_BT = jnp.full(rows.pos_BT.shape, jnp.inf, exact_dtype(model.dtype))
    previous_BT = lax.while_loop(lambda carry: carry[1], again, (unknown_BT, jnp.bool_(True)))[0]
    return masked.run(params, rows, model, mech, previous_BT)


_jit_dense = jax.jit(score_dense, static_argnames=("model", "count", "returns"))
_jit_masked = jax.jit(score_masked, static_argnames=("model", "count", "returns"))
_jit_prompt = jax.jit(score_prompt, static_argnames=("model", "plan", "count", "returns"))


@default_settings()
def score(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    attention_mask: Any = None,
    prompt_lengths: Sequence[int] | np.ndarray | None = None,
    overrides: TokenOverrides | None = None,
    return_logits: bool = False,
    return_states: bool = False,
    devices: Devices | None = None,
) -> ScoreOutput:
    """Log-probability of every token given the tokens before it in its row.

    A row's result depends neither on padding nor on the other rows, and a token touches no earlier
    position (min-max entropy, which looks at the whole batch, is the one exception). Under
    "continuation" the mechanisms act on each row's prompt and only the tokens after it are scored.

    Args:
      params: From `qs_jax.load`.
      tokens: int `[B, T]`, one row `[T]`, or rows of different lengths.
      cfg: Model, mechanisms and protocol; sampling plays no part.
      lengths: `[B]` valid tokens of each right-padded row.
      attention_mask: `[B, T]`, true for real tokens; left or right padding.
      prompt_lengths: `[B]`, "continuation" only: tokens of each prompt; by default all but the last
        `cfg.continuation_tokens`.
      overrides: Of single tokens, whatever their signals.
      return_logits: Also return `[B, T, V]` float32 logits (4 * B * T * V bytes);
        mechanisms then run on the masked engine.
      return_states: Also return the `[B, T, D]` states that the head reads.
      devices: Split the rows over a sequence of devices (`jax.pmap`), e.g. `jax.local_devices()`,
        or rows and parameters over a mesh (`jax.jit`) from `qs_jax.make_mesh`. Parameters that are
        not there are copied at every call; `qs_jax.replicate` or `qs_jax.shard` does it once.
        Under `pmap`, min-max entropy looks at the rows of one device.

    Returns:
      Per-position log-probabilities in nats, rows right-padded, and the record of the mechanisms.

    Raises:
      ConfigError: The parameters are another model's, the maps a policy needs are missing, or
        `devices` is a mesh with other axes.
      InputError: Tokens cannot be used, or a row exceeds the position limit.
      NonFiniteError: The model produced NaN or infinite logits.
    """
    model, mech = cfg.model, resolve(cfg.quicksilver, cfg.model, cfg.effective_protocol)
    mesh = on_devices.as_mesh(devices) if isinstance(devices, Mesh) else None
    params = prepare_params(params, model, mech, mesh)
    batch, padded = inputs.prepare_batch(
        tokens, model, lengths=lengths, attention_mask=attention_mask
    )
    width = batch.tokens_BT.shape[1]
    column_1T = np.arange(width)[None, :]
    ends_B = inputs.split_prompts(batch.lengths_B, prompt_lengths, cfg)
    first_B = np.maximum(ends_B, 1).astype(np.int32)
    mask_BT = (column_1T < batch.lengths_B[:, None]) & (column_1T >= first_B[:, None])
    count = padded.tokens_BT.shape[1]
    if cfg.effective_protocol == "continuation":  # a bucket, so that near counts share a program
        count = inputs.bucket_size(max(int(mask_BT.sum(1).max()), 1), count)
    static: dict[str, Any] = {"model": model, "count": count}
    chosen = inputs.override_arrays(overrides, padded.tokens_BT.shape, width, cfg)
    returns = ("logits",) * return_logits + ("states",) * return_states
    rows, shared = (padded, ends_B, first_B, chosen), (mech,)
    if mech.is_off:
        static["returns"], rows, shared = returns, (padded.tokens_BT, first_B), ()
        program, function = _jit_dense, score_dense
    elif runs_fast(cfg, generates=False) and not return_logits:
        static["returns"] = returns
        static["plan"], segments = arrange(cfg, padded, ends_B, chosen, mech)
        program, function, shared = _jit_prompt, score_prompt, (mech, segments)
    else:
        static["returns"], program, function = returns, _jit_masked, score_masked
    if devices is None or isinstance(devices, Mesh):
        out = program(params, *on_devices.put_rows(rows, mesh), *shared, **static)
        out = on_devices.first_rows(jax.device_get(out), len(batch.lengths_B))
    else:
        out = on_devices.run(function, devices, params, rows, shared, static)
    record = None
    if not mech.is_off:
        assert cfg.quicksilver is not None
        about = (width, batch.lengths_B, ends_B, cfg.effective_protocol)
        if "evidence" in out:
            record = Record.of(out["evidence"], *about, quicksilver=cfg.quicksilver)
        else:
            given = (cfg.quicksilver, model, batch.lengths_B)
            told = {"simulated": False, "quicksilver": cfg.quicksilver}
            record = Record.of(decided(out["decisions"], *given), *about, **told)
    logprobs_BT = np.where(mask_BT, out["logprobs"][:, :width], out["logprobs"].dtype.type(0))
    arrays = {name: out[name][:, :width] for name in returns}
    for array in (logprobs_BT[..., None], *arrays.values()):
        check_finite(np.all(np.isfinite(array.astype(np.float32)), axis=(1, 2)))
    return ScoreOutput(logprobs_BT, mask_BT, arrays.get("logits"), arrays.get("states"), record)
