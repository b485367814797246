"""One text through the masked engine, mechanisms on and off, with the signals of every layer.

A `Record` has a signal only where a decision read it. Here drift and entropy are computed after
every layer, for display.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from qs_jax.config import Config, HaltingConfig, ModelConfig, QuickSilverConfig
from qs_jax.config.fields import name_of
from qs_jax.engine import inputs, masked
from qs_jax.engine.score import next_logprobs
from qs_jax.engine.weights import check_finite, layer_weights, prepare_params
from qs_jax.errors import ConfigError, InputError
from qs_jax.jax_settings import default_settings
from qs_jax.mechanisms import Mechanisms, resolve, signals
from qs_jax.mechanisms.custom import Signals
from qs_jax.models import Params, head
from qs_jax.record import Record
from qs_jax.state import NEVER, evidence

# The paper's letters (P).
PARTS = {"H": "halting", "K": "kv_skip", "F": "fusion", "Q": "amq"}


Text: TypeAlias = tuple[inputs.Batch, Int[np.ndarray, "B"]]  # one row, and its prompt's length


@dataclasses.dataclass(frozen=True)
class Run:
    """A text under some of a preset's mechanisms.

    Attributes:
      letters: Which: a part of "HKFQ"; "" is the dense model.
      record: What they did, one row; simulated.
      signals: By name, after every layer; nan where the token did not run it.
      logprobs: Log-probability of each token, in nats; 0 where not scored.
      mask: Positions that are scored.
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


def signal_kinds(qs: QuickSilverConfig) -> dict[str, str]:
    """Signals of a preset's runs, and how each is computed; what halting reads comes first.

    "entropy" is by the estimator that halting reads, else the exact logit lens. "bits_entropy" is
    of the state after fusion, where AMQ reads another estimator.
    """
    rule, kinds = qs.halting or HaltingConfig(entropy=None), {}
    if (rule.rule, rule.score) == ("quota", "attention"):
        kinds["received"] = "attention"
    if rule.ranks and not isinstance(rule.score, str):
        kinds["own"] = name_of(rule.score)
    kinds |= {"drift": rule.drift, "entropy": rule.entropy_used or "vocab"}
    if qs.amq is not None and qs.amq.entropy not in (None, kinds["entropy"]):
        kinds["bits_entropy"] = qs.amq.entropy
    return kinds


def signal_names(qs: QuickSilverConfig) -> dict[str, str]:
    """Name of each signal for a reader."""
    names = {"received": "{} received", "drift": "{} drift", "entropy": "entropy ({})"}
    names |= {"bits_entropy": "entropy for bits ({})", "own": "score {}"}
    return {name: names[name].format(kind) for name, kind in signal_kinds(qs).items()}


def letters_of(qs: QuickSilverConfig) -> str:
    """The mechanisms that are on, in the order H, K, F, Q; "" is the dense model."""
    return "".join(letter for letter, part in PARTS.items() if getattr(qs, part) is not None)


def reduced(qs: QuickSilverConfig, letters: str) -> QuickSilverConfig:
    """The same settings with only some mechanisms on."""
    off = {part: None for letter, part in PARTS.items() if letter not in letters}
    return dataclasses.replace(qs, **off)


def combinations(qs: QuickSilverConfig) -> dict[str, QuickSilverConfig]:
    """Mechanisms of a preset that can be on together, from the dense model "" to everything."""
    letters, valid = letters_of(qs), {}
    for count in range(len(letters) + 1):
        for chosen in map("".join, itertools.combinations(letters, count)):
            with contextlib.suppress(ConfigError):
                valid[chosen] = reduced(qs, chosen)
    return valid


@default_settings()
def trace(
    params: Params,
    tokens: Int[np.ndarray, "T"],
    cfg: Config,
    *,
    all_combinations: bool = True,
    progress: bool = False,
) -> Iterator[Run]:
    """Run a text under every combination of a preset's mechanisms, the dense model first.

    Decisions, records and log-probabilities are those of `qs_jax.score` on the masked engine. Two
    programs at most are compiled. Only the dense model and the whole preset have logit-lens
    entropies, which cost several times the forward pass.

    Args:
      params: From `qs_jax.load`; with "kv_maps" where the preset extrapolates.
      tokens: One row.
      cfg: Model, preset and protocol.
      all_combinations: False runs the dense model and the whole preset only.
      progress: Show a progress bar.

    Raises:
      ConfigError: The parameters are another model's, or the maps a policy needs are missing.
      InputError: Tokens cannot be used, or rows of this preset can only run token by token.
      NonFiniteError: The model produced NaN or infinity.
    """
    qs = cfg.quicksilver or QuickSilverConfig()
    if "final_prev" in qs.entropies:
        raise InputError("final_prev runs token by token: use another entropy in a report.")
    batch, padded = inputs.prepare_batch(tokens, cfg.model)
    text = (padded, inputs.split_prompts(batch.lengths_B, None, cfg))
    ends = {"", letters_of(qs)}
    chosen = [letters for letters in combinations(qs) if all_combinations or letters in ends]
    mask_T = np.arange(int(batch.lengths_B[0])) >= max(int(text[1][0]), 1)
    for letters in tqdm(chosen, unit="run", disable=not progress):
        kinds = {k: v for k, v in signal_kinds(qs).items() if letters in ends or v != "vocab"}
        out = _run(params, text, cfg, letters, kinds)
        yield _as_run(out, text, cfg, letters, mask_T)


def _as_run(out: dict[str, Any], text: Text, cfg: Config, letters: str, mask_T: np.ndarray) -> Run:
    qs, width = cfg.quicksilver or QuickSilverConfig(), len(mask_T)
    lengths_B, ends_B = text[0].lengths_B, text[1]
    ran = reduced(qs, letters)
    told = (out["evidence"], width, lengths_B, ends_B, cfg.effective_protocol)
    record = Record.of(*told, quicksilver=ran if letters else None)
    if "H" not in letters:  # the program computed the drift of a rule that is off
        record = dataclasses.replace(record, drift=np.full_like(record.drift, np.nan))
    logprobs_T = np.where(mask_T, out["logprobs"][0, :width], 0).astype(np.float32)
    check_finite(np.array([np.isfinite(logprobs_T).all()]))
    values = {name: np.array(array[:, 0, :width]) for name, array in out["signals"].items()}
    for name in {"received", "own"} & values.keys():  # a quota ranks the prompt
        values[name][:, ~record.subject[0]] = np.nan
    for name, kind in signal_kinds(qs).items():
        if kind == "shortlist":
            values[name][: (qs.shortlist_layer or 1) - 1] = np.nan  # its ids are picked there
    return Run(letters, ran, record, values, logprobs_T, mask_T)


def _run(params: Params, text: Text, cfg: Config, letters: str, kinds: dict[str, str]) -> Any:
    """Run one combination; those that skip keys share a program, and all others share one."""
    qs = cfg.quicksilver or QuickSilverConfig()
    if "K" not in letters:
        rule = qs.halting or (HaltingConfig() if qs.is_off else None)
        rule = rule and dataclasses.replace(rule, freeze=True, light_from=None, light_share=1.0)
        qs = dataclasses.replace(qs, halting=rule, kv_skip=None)
    mech = resolve(qs, cfg.model, cfg.effective_protocol)
    params = prepare_params(params, cfg.model, mech)
    static = {"model": cfg.model, "kinds": tuple(kinds.items())}
    return jax.device_get(_look(params, *text, switch_off(mech, letters), **static))


def switch_off(mech: Mechanisms, letters: str) -> Mechanisms:
    """The same program with no other mechanism than `letters` acting: no layer is one of theirs."""
    rule, fusion, amq = mech.halting, mech.fusion, mech.amq
    if rule is not None and "H" not in letters:
        never = jnp.full_like(rule.forced_layer, NEVER)
        rule = rule.replace(may_halt_L=jnp.zeros_like(rule.may_halt_L), forced_layer=never)
    if fusion is not None and "F" not in letters:
        fusion = fusion.replace(may_fuse_L=jnp.zeros_like(fusion.may_fuse_L))
    if amq is not None and "Q" not in letters:
        amq = amq.replace(layer=jnp.full_like(amq.layer, NEVER))
    return mech.replace(halting=rule, fusion=fusion, amq=amq)


@functools.partial(jax.jit, static_argnames=("model", "kinds"))
def _look(
    params: Params,
    batch: inputs.Batch,
    ends_B: Int[Array, "B"],
    mech: Mechanisms,
    model: ModelConfig,
    kinds: tuple[tuple[str, str], ...],
) -> dict[str, Any]:
    """`masked.run` with the signals of every layer: evidence, log-probabilities and signals."""
    rows = inputs.whole_rows(batch, ends_B, None, mech)
    call = masked.open_call(params, rows, model, mech)

    def body(state, scanned):
        before = state
        state, record, attended = masked.run_layer(call, state, *scanned)

        def signal(name: str, kind: str) -> Array:
            if name == "drift":
                return signals.drift(kind, attended.h_BTD, before.h_BTD)
            if name == "received":
                return masked.received(call, before, attended)
            if name == "own":
                assert mech.halting is not None
                ready_BT = masked.eligible(call, before) & (before.depth_BT >= scanned[0])
                told = (rows, ready_BT, scanned[0], record.drift_BT, record.entropy_BT)
                read = Signals.of(*told, masked.scored(call, before, attended))
                return mech.halting.score(read).astype(record.drift_BT.dtype)
            h_BTD = attended.h_BTD if name == "entropy" else state.h_BTD
            with jax.named_scope("signals"):
                return signals.entropy(kind, h_BTD, params, model, state.shortlist_BTX, None)

        ran_BT = before.active_BT
        seen = {name: jnp.where(ran_BT, signal(name, kind), jnp.nan) for name, kind in kinds}
        return state, (record, seen)

    numbers = jnp.arange(1, model.num_layers + 1, dtype=jnp.int32)
    state, (record, seen) = lax.scan(body, masked.start(call), (numbers, layer_weights(params)))
    h_BTD = head.normed(params, state.h_BTD, model)
    return {
        "evidence": evidence(state, record),
        "logprobs": next_logprobs(params, h_BTD, batch.tokens_BT),
        "signals": seen,
    }
