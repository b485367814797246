"""One text through the masked engine, mechanisms on and off, with the signals of every layer.

A `Record` holds the signals that decisions read, so it has none where nothing was decided. A
picture wants them everywhere: here they are computed after every layer, whoever reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from qs_jax.config import Config, HaltingConfig, ModelConfig, QuickSilverConfig
from qs_jax.engine import batching, decisions, layer, opening, tokenwise
from qs_jax.engine import past as pasts
from qs_jax.engine.attention import Attended
from qs_jax.engine.call import Call
from qs_jax.engine.checks import check_finite, check_maps, check_params
from qs_jax.engine.schedule import bind_call
from qs_jax.engine.scoring import next_logprobs
from qs_jax.errors import InputError
from qs_jax.halves import bits_of
from qs_jax.mechanisms import halting, signals
from qs_jax.mechanisms.execution import with_weights
from qs_jax.mechanisms.plan import NEVER, Numbers, Plan
from qs_jax.models import Params, head
from qs_jax.record import Record


@dataclasses.dataclass(frozen=True)
class Run:
    """A text under some of a preset's mechanisms.

    Attributes:
      letters: Which: a part of "HKFQ"; "" is the dense model.
      quicksilver: The same as settings.
      record: What they did, one row; simulated.
      signals: float `[L, T]` by name (`signal_names`), after every layer, nan where the token did
        not run it. Entropies by the logit lens may be left out (`trace`).
      logprobs: float `[T]`, log-probability of each token, in nats; 0 where not scored.
      mask: bool `[T]`, positions that are scored.
    """

    letters: str
    quicksilver: QuickSilverConfig
    record: Record
    signals: dict[str, Float[np.ndarray, "L T"]]
    logprobs: Float[np.ndarray, "T"]
    mask: Bool[np.ndarray, "T"]

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood of the scored positions."""
        return float(np.exp(-self.logprobs.sum(dtype=np.float64) / self.mask.sum()))


def signal_names(qs: QuickSilverConfig) -> dict[str, str]:
    """Signals of a preset's runs and what they are.

    "drift" of the preset's kind; "entropy" by the estimator that halting reads, the exact logit
    lens where it reads none; "bits_entropy" by the estimator that AMQ reads, of the state after
    fusion, where that is another one; "received", most attention from the prompt's last queries,
    where a quota ranks by it.
    """
    kind, estimator, bits = _kinds(qs)
    names = {"drift": f"{kind} drift", "entropy": f"entropy ({estimator})"}
    if bits != estimator:
        names["bits_entropy"] = f"entropy for bits ({bits})"
    halting = qs.halting
    if halting is not None and (halting.rule, halting.score) == ("quota", "attention"):
        names["received"] = "attention received"
    return names


def trace(
    params: Params,
    tokens: Int[np.ndarray, "T"],
    cfg: Config,
    *,
    prompt_length: int | None = None,
    all_combinations: bool = True,
    every_signal: bool = False,
    progress: bool = False,
) -> Iterator[Run]:
    """Run a text under every combination of a preset's mechanisms, the dense model first.

    Decisions, records and log-probabilities are those of `qs_jax.score` on the masked engine. Two
    programs at most are compiled: mechanisms are switched by numbers. Memory grows with the
    attention weights of a layer, N x T x T, time with an entropy of every layer.

    Args:
      params: From `qs_jax.load`; with "kv_maps" where the preset extrapolates.
      tokens: One row.
      cfg: Model, preset and protocol.
      prompt_length: Under "continuation"; None leaves `cfg.continuation_tokens` to be scored.
      all_combinations: False runs the dense model and the whole preset only.
      every_signal: Compute logit-lens entropies of every layer for every combination, not for the
        dense model and the whole preset only: the lens costs several times the forward pass.
      progress: Show a progress bar.

    Yields:
      A run for each of `combinations`.

    Raises:
      ConfigError: The parameters are another model's, or the maps a policy needs are missing.
      InputError: Tokens cannot be used, or rows of this preset can only run token by token.
      NonFiniteError: The model produced NaN or infinity.
    """
    qs = cfg.quicksilver or QuickSilverConfig()
    check_params(params, cfg.model)
    if "final_prev" in qs.entropies:
        raise InputError(
            "the final_prev entropy runs token by token, and a report looks at whole rows: use a "
            "preset with another estimator."
        )
    lengths = None if prompt_length is None else [prompt_length]
    batch, padded = batching.prepare_batch(tokens, cfg.model)
    ends_B = batching.split_prompts(batch.lengths_B, lengths, cfg)
    host: Any = (*padded, ends_B)  # NumPy arrays until the program takes them
    prompt = tokenwise.Prompt(*host, overrides=None)
    chosen = combinations(qs, all_combinations)
    for letters in tqdm(chosen, unit="run", disable=not progress):
        names = signal_names(qs)
        if not (every_signal or letters in (chosen[0], chosen[-1])):
            kinds: dict[str, Any] = dict(
                zip(("drift", "entropy", "bits_entropy"), _kinds(qs), strict=True)
            )
            names = {name: told for name, told in names.items() if kinds.get(name) != "vocab"}
        program = cfg.replace(quicksilver=_program(qs, letters))
        out = _run(params, prompt, program, letters, qs, tuple(names))
        yield _as_run(out, batch, ends_B, cfg.replace(quicksilver=reduced(qs, letters)), letters)


def _as_run(out: dict[str, Any], batch: Any, ends_B: np.ndarray, cfg: Config, letters: str) -> Run:
    assert cfg.quicksilver is not None
    width = batch.tokens_BT.shape[1]
    record = Record.of(
        out["evidence"], width, batch.lengths_B, ends_B, cfg.effective_protocol, simulated=True
    )
    if "H" not in letters:  # switched off, halting still looked
        record = dataclasses.replace(record, drift=np.full_like(record.drift, np.nan))
    mask_T = np.arange(width) >= max(int(ends_B[0]), 1)
    logprobs_T = np.where(mask_T, out["logprobs"][0, :width], 0).astype(np.float32)
    check_finite(np.array([np.isfinite(logprobs_T).all()]))
    found = {name: np.array(array[:, 0, :width]) for name, array in out["signals"].items()}
    if "received" in found:  # a quota ranks the prompt
        found["received"][:, ~record.subject[0]] = np.nan
    return Run(letters, cfg.quicksilver, record, found, logprobs_T, mask_T)


def _program(qs: QuickSilverConfig, letters: str) -> QuickSilverConfig:
    """Settings whose program can run a combination: all that skip keys share one, all others too.

    The dense model is the latter with everything switched off.
    """
    if "K" in letters:
        return qs
    halting = qs.halting or (HaltingConfig() if qs.is_off else None)
    if halting is not None:
        halting = dataclasses.replace(halting, freeze=True)
    return dataclasses.replace(qs, halting=halting, kv_skip=None)


def _run(
    params: Params,
    prompt: tokenwise.Prompt,
    cfg: Config,
    letters: str,
    qs: QuickSilverConfig,
    names: tuple[str, ...],
) -> dict[str, Any]:
    bound = bind_call(cfg, "masked")
    assert bound is not None
    plan, numbers = bound
    check_maps(params, plan, cfg.model)
    params = bits_of(with_weights(params, plan))
    kinds, numbers = _kinds(qs), switched(numbers, letters)
    out = jax.device_get(
        _look(params, prompt, numbers, model=cfg.model, plan=plan, kinds=kinds, names=names)
    )
    for name, kind in zip(("drift", "entropy", "bits_entropy"), kinds, strict=True):
        if kind == "shortlist" and name in names:  # there is none before its layer
            assert qs.shortlist_layer is not None
            array = np.array(out["signals"][name])
            array[: qs.shortlist_layer - 1] = np.nan
            out["signals"][name] = array
    return out


def _kinds(qs: QuickSilverConfig) -> tuple[str, str, str]:
    """Drift, entropy and entropy for bits; what the paper reads where the preset has none."""
    bits = (qs.amq.entropy if qs.amq is not None else None) or "vocab"
    if qs.halting is None:
        return "raw", "vocab", bits
    return qs.halting.drift, qs.halting.entropy_used or "vocab", bits


@functools.partial(jax.jit, static_argnames=("model", "plan", "kinds", "names"))
def _look(
    params: Params,
    prompt: tokenwise.Prompt,
    numbers: Numbers,
    model: ModelConfig,
    plan: Plan,
    kinds: tuple[str, str, str],
    names: tuple[str, ...],
) -> dict[str, Any]:
    """`masked.run`, looking at every layer: evidence, log-probabilities and signals."""
    rows = tokenwise.whole_rows(prompt, plan, numbers)
    call = opening.open_call(
        params, rows, model, plan, numbers, None, False, prompt.prompt_lengths_B
    )

    def body(state, scanned):
        at, weights, past_l = scanned
        before_BTD = state.h_BTD
        state, attended, ran_BT, drift_BT = layer._block(call, state, None, at, weights, past_l)
        after_BTD = state.h_BTD
        state, record, _ = decisions.decide_layer(
            call, state, attended, ran_BT, drift_BT, at, past_l
        )
        drift_kind, entropy_kind, bits_kind = kinds

        def entropy(kind: str, h_BTD: Array) -> Array:
            with jax.named_scope("signals"):
                return signals.entropy(kind, h_BTD, params, model, state.shortlist_BTX, None)

        known: dict[str, Callable[[], Array]] = {
            "drift": lambda: signals.drift(drift_kind, after_BTD, before_BTD),
            "entropy": lambda: entropy(entropy_kind, after_BTD),
            "bits_entropy": lambda: entropy(bits_kind, state.h_BTD),
            "received": lambda: _received(call, attended, ran_BT),
        }
        seen = {name: jnp.where(ran_BT, known[name](), jnp.nan) for name in names}
        return state, (record, seen)

    weights = layer.weights_of(call, params["layers"])
    scanned = (numbers.layers, weights, pasts.by_layer(None))
    state, (record, seen) = lax.scan(body, opening.start(call), scanned)
    h_BTD = head.normed(params, state.h_BTD, model)
    return {
        "evidence": tokenwise.evidence_of(state, record),
        "logprobs": next_logprobs(params, h_BTD, prompt.tokens_BT),
        "signals": seen,
    }


def _received(call: Call, attended: Attended, ran_BT: Array) -> Array:
    """What a quota ranks by: most attention from the prompt's last queries."""
    width = ran_BT.shape[1]
    own_BQ = jnp.broadcast_to(jnp.arange(width)[None], ran_BT.shape)
    weights_BQS = attended.weights().max(1)
    return halting.attention_received(weights_BQS, call.rows.asking_BT & ran_BT, own_BQ)


# The letters are the paper's (P).
PARTS = {"H": "halting", "K": "kv_skip", "F": "fusion", "Q": "amq"}


def letters_of(qs: QuickSilverConfig) -> str:
    """The mechanisms that are on, in the order H, K, F, Q; "" is the dense model."""
    return "".join(letter for letter, part in PARTS.items() if getattr(qs, part) is not None)


def reduced(qs: QuickSilverConfig, letters: str) -> QuickSilverConfig:
    """The same settings with only some mechanisms on.

    Raises:
      ConfigError: They make no sense without the others.
    """
    off = {part: None for letter, part in PARTS.items() if letter not in letters}
    return dataclasses.replace(qs, **off)


def combinations(qs: QuickSilverConfig, all_of_them: bool = True) -> list[str]:
    """What can be switched on together, from the dense model "" to everything.

    KV skipping acts on halted tokens only, so it needs halting; halting that lets flagged tokens
    compute on (`freeze=False`) needs KV skipping.

    Args:
      qs: Everything that is on in the preset.
      all_of_them: False gives the dense model and the whole preset only.
    """
    own = letters_of(qs)
    if not all_of_them:
        return list(dict.fromkeys(["", own]))
    found = []
    for count in range(len(own) + 1):
        for chosen in itertools.combinations(own, count):
            letters = "".join(chosen)
            together = "K" in letters or qs.halting is None or qs.halting.freeze
            if ("H" in letters or "K" not in letters) and ("H" not in letters or together):
                found.append(letters)
    return found


def switched(numbers: Numbers, letters: str) -> Numbers:
    """Numbers under which a program runs as if the other mechanisms were off.

    No token may halt, fuse or get bits where they are; so one program serves all combinations that
    share a KV policy. Whether keys are skipped is in the program itself.

    Args:
      numbers: Of the whole preset.
      letters: What stays on.
    """
    layers = numbers.layers
    nowhere = jnp.zeros_like(layers.may_halt)
    if "H" not in letters:
        layers = layers._replace(may_halt=nowhere)
        numbers = numbers._replace(forced_layer=jnp.full_like(numbers.forced_layer, NEVER))
    if "F" not in letters:
        layers = layers._replace(may_fuse=nowhere)
    if "Q" not in letters:
        layers = layers._replace(assign_bits=nowhere, has_bits=nowhere)
    return numbers._replace(layers=layers)
