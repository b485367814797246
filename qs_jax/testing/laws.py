"""The laws that every configuration obeys, as checks to call in a test suite.

1. Causality: changing a token changes no earlier prediction, bit for bit in the definition and to
   1e-5 on the fast engines; and no earlier decision. A prompt's decisions read nothing after it.
2. A row depends neither on its batch mates nor on padding.
3. The prompt engine decides as the masked one, and gives the same numbers.
4. A token that stopped stays stopped; where every token is exempt, the numbers are the dense
   model's.

A halting score and a KV policy of the user's own are also probed on random signals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qs_jax.calibration.fit_maps import fit_kv_maps
from qs_jax.config import Config, ModelConfig, QuickSilverConfig
from qs_jax.engine.prompt_plan import refusal
from qs_jax.engine.score import ScoreOutput, score
from qs_jax.models import Params
from qs_jax.record import Record
from qs_jax.testing.models import tiny_model, tiny_params
from qs_jax.testing.probes import probe_policy, probe_score

NEW = 8  # tokens of a continuation
COUNTED = ("active", "kv_written", "kv_held", "visible_keys", "bits", "weighed")


def check_laws(cfg: Config | QuickSilverConfig, params: Params | None = None) -> None:
    """Hold a configuration against the laws, on a tiny model and random tokens.

    A score of your own may read, for each token, its own signals and those of earlier tokens, or
    statistics of the tokens in `Signals.ready_BT` that do not depend on their order: a quota ranks
    a prompt that is known whole. `received_BT` may be read anywhere in the prompt. A KV policy of
    your own may read each token's own entries of `Frozen`.

    Args:
      cfg: Mechanisms, for which a tiny float64 model is made; or a whole call, its model small.
      params: Of its model; by default random, with maps fitted where the policy is "extrapolate".
        Light layers need parameters with maps that hold them.

    Raises:
      AssertionError: A law is broken; the message names it and the part that broke it.
      ConfigError: The settings do not fit the model.
    """
    if isinstance(cfg, QuickSilverConfig):
        lengths = sum(_lengths(cfg)[0])
        model = tiny_model(num_layers=_depth(cfg), dtype="float64", max_positions=max(128, lengths))
        cfg = Config(model, cfg)
    qs, cfg = cfg.quicksilver or QuickSilverConfig(), cfg.replace(protocol=cfg.effective_protocol)
    with jax.enable_x64(cfg.model.dtype == "float64"):
        if qs.halting is not None and qs.halting.ranks:
            probe_score(qs.halting, cfg.model)
        if qs.kv_skip is not None and qs.kv_skip.is_custom:
            probe_policy(qs.kv_skip, cfg.model)
        params = params or _random_params(cfg, qs)
        lengths = _lengths(qs)
        rows = [tokens_of(cfg.model, sum(pair)) for pair in lengths]
        prompts = [prompt for prompt, _ in lengths]
        runs = run(params, cfg.replace(engine="masked"), rows, prompts)
        check_causality(runs)
        check_batch_mates(runs)
        check_padding(runs)
        check_stopping(runs)
        check_exempt(runs)
        if refusal(cfg, generates=False) is None and not qs.is_off:
            check_engines(runs, run(params, cfg.replace(engine="compact"), rows, prompts))


def _lengths(qs: QuickSilverConfig) -> list[tuple[int, int]]:
    """Tokens of two prompts, most of which the mechanisms may touch, and of their continuations."""
    exempt = [recent for _, recent in qs.recent_tokens_over if recent <= 256]
    exempt = qs.sink_tokens + max(qs.recent_tokens, *exempt, 1)
    return [(exempt + 48, NEW), (exempt + 9, NEW)]


def _depth(qs: QuickSilverConfig) -> int:
    """Layers of a model that the settings fit."""
    taus = [getattr(qs.halting, name, None) for name in ("tau_drift", "tau_halt")]
    taus.append(getattr(qs.fusion, "tau_fuse", None))
    by_layer = [len(tau) for tau in taus if isinstance(tau, tuple)]
    if by_layer:
        return by_layer[0]
    named = [4, qs.shortlist_layer or 0]
    if qs.halting is not None:
        last = (qs.halting.window or (0, 0))[1]
        named += [last, *(qs.halting.layers or ()), qs.halting.forced_layer or 0]
    if qs.fusion is not None:
        named += [qs.fusion.first_layer, qs.fusion.last_layer or 0]
    return max([*named, qs.amq.layer if qs.amq is not None else 0]) + 2


def _random_params(cfg: Config, qs: QuickSilverConfig) -> Params:
    params = tiny_params(cfg.model)
    if qs.halting is None or qs.kv_skip is None or qs.kv_skip.policy != "extrapolate":
        return params
    given = {"layers": qs.halting.layers, "features": ("state", "embedding"), "model": cfg.model}
    tokens = [tokens_of(cfg.model, 64 + index) for index in range(8)]
    return {**params, "kv_maps": fit_kv_maps(params, tokens, **given)}


def tokens_of(model: ModelConfig, width: int) -> list[int]:
    """A row of random ids that is the same for every caller."""
    ids = np.random.default_rng(width).integers(2, model.vocab_size, (1, width), np.int32)
    return ids[0].tolist()


class Runs(NamedTuple):
    """Rows scored by one program.

    Attributes:
      params: Parameters.
      cfg: The call.
      rows: Two or more, the longest first.
      prompts: Their prompts' lengths.
      changed: Positions in the first row.
      before: The first row, once for each of `changed`, and the other rows.
      after: The same with the token exchanged at each of these.
      moved: The rows of `before` in reverse.
    """

    params: Params
    cfg: Config
    rows: Sequence[list[int]]
    prompts: Sequence[int]
    changed: range
    before: ScoreOutput
    after: ScoreOutput
    moved: ScoreOutput

    @property
    def continues(self) -> bool:
        """Mechanisms act on prompts only."""
        return self.cfg.effective_protocol == "continuation"

    @property
    def tolerance(self) -> float:
        """How far numbers of two programs may be apart."""
        return 1e-5 if self.cfg.model.dtype == "float64" else 2e-4


def run(
    params: Params, cfg: Config, rows: Sequence[list[int]], prompts: Sequence[int], step: int = 4
) -> Runs:
    """Score rows as the laws compare them; every `step`th token of the first that may change."""
    (long, *others), logits = rows, cfg.engine == "masked"
    continues = cfg.effective_protocol == "continuation"
    changed = range(prompts[0] if continues else 1, len(long), step)
    exchanged = [list(long) for _ in changed]
    for row, j in zip(exchanged, changed, strict=True):
        row[j] = (row[j] + 1) % cfg.model.vocab_size
    ends = [prompts[0]] * len(changed) + [*prompts[1:]]

    def scored(rows: list[list[int]], ends: list[int]) -> ScoreOutput:
        given: Any = {"prompt_lengths": ends} if continues else {}
        return score(params, rows, cfg, return_logits=logits, **given)

    same = [long] * len(changed) + others
    calls = (scored(same, ends), scored([*exchanged, *others], ends))
    return Runs(params, cfg, rows, prompts, changed, *calls, scored(same[::-1], ends[::-1]))


def check_causality(runs: Runs) -> None:
    """Law 1."""
    first = runs.prompts[0] if runs.continues else 1
    for row, j in enumerate(runs.changed):
        for decided in _same_before(runs, row, runs.prompts[0] if runs.continues else j):
            raise AssertionError(f"causality: token {j} changes {decided} of earlier tokens.")
        before, after = runs.before, runs.after
        if before.logits is None or after.logits is None:
            old, new, apart = before.logprobs[row], after.logprobs[row], 1e-5
            own = slice(j, None)
        else:
            old, new, apart = before.logits[row, first - 1 :], after.logits[row, first - 1 :], 0.0
            own, j = slice(j - first + 1, len(runs.rows[0]) - first + 1), j - first + 1
        wrong = np.abs(new[:j] - old[:j]) > apart
        _hold(not wrong.any(), "causality", f"token {j} changes earlier predictions")
        _hold(bool((new[own] != old[own]).any()), "causality", f"token {j} changes nothing")


def _same_before(runs: Runs, row: int, end: int) -> Iterator[str]:
    """Names of decisions that differ before a position."""
    before, after = runs.before.record, runs.after.record
    if before is None or after is None:
        return
    for name in ("active", "bits", "depth", *(["fused"] if runs.continues else [])):
        old, new = (getattr(record, name)[..., row, :end] for record in (before, after))
        if (old != new).any():
            yield name


def _hold(law_holds: bool, law: str, message: str) -> None:
    if not law_holds:
        raise AssertionError(f"{law}: {message}.")


def check_batch_mates(runs: Runs) -> None:
    """Law 2: the same rows beside others, and at other places in the batch."""
    amq = runs.cfg.quicksilver and runs.cfg.quicksilver.amq
    if amq and amq.normalization == "minmax":
        return  # by definition over the batch
    count, exact = len(runs.changed), runs.cfg.engine == "masked"
    for row in range(count, count + len(runs.rows) - 1):
        both = (runs.before, row, runs.after, row)
        _same_row(*both, "batch mates", 0.0 if exact else runs.tolerance)
    for row in range(len(runs.before.logprobs)):
        there = len(runs.before.logprobs) - 1 - row
        _same_row(runs.before, row, runs.moved, there, "batch mates", runs.tolerance)


def check_padding(runs: Runs) -> None:
    """Law 2: alone, the last row is padded less."""
    given: Any = {"prompt_lengths": runs.prompts[-1:]} if runs.continues else {}
    alone = score(runs.params, runs.rows[-1:], runs.cfg, **given)
    row = len(runs.before.logprobs) - 1
    _same_row(runs.before, row, alone, 0, "padding", runs.tolerance)


def _same_row(
    one: ScoreOutput, row: int, other: ScoreOutput, place: int, law: str, apart: float
) -> None:
    """Raise unless a row of two outputs has the same numbers and decisions."""
    width = int(other.record.lengths[place]) if other.record else other.logprobs.shape[1]
    width = min(width, one.logprobs.shape[1])
    old, new = one.logprobs[row, :width], other.logprobs[place, :width]
    far = float(np.abs(old - new).max())
    _hold(far <= apart, law, f"log-probabilities of a row differ by {far:.2g}")
    if one.record is not None and other.record is not None:
        for name in _unlike(one.record, row, other.record, place, width):
            raise AssertionError(f"{law}: {name} of a row differs.")


def _unlike(one: Record, row: int, other: Record, place: int, width: int) -> list[str]:
    pairs = {
        name: (getattr(one, name)[:, row, :width], getattr(other, name)[:, place, :width])
        for name in COUNTED
    }
    return [name for name, (old, new) in pairs.items() if (old != new).any()]


def check_engines(masked: Runs, fast: Runs) -> None:
    """Law 3, and the laws 1 and 2 of the fast engine."""
    check_causality(fast)
    check_batch_mates(fast)
    check_padding(fast)
    for row in range(len(masked.before.logprobs)):
        both = (masked.before, row, fast.before, row)
        _same_row(*both, "masked and prompt engine", masked.tolerance)


def check_stopping(runs: Runs) -> None:
    """Law 4: halting is monotone, absorbed tokens stay absorbed, and bits stay assigned."""
    qs, record = runs.cfg.quicksilver, runs.before.record
    if record is None or qs is None:
        return
    number = np.arange(1, len(record.active) + 1)[:, None, None]
    if qs.halting is not None and qs.halting.freeze:
        late = record.active[number > record.depth].any()
        _hold(not late, "halting is monotone", "a token runs after it halted")
    back = (np.diff(record.active.astype(int), axis=0) > 0).any()
    _hold(not back, "halting is monotone", "a stopped token runs again")
    for fused in (*record.fused, record.representative):
        twice = np.take_along_axis(fused, fused, -1)
        ahead = fused >= np.arange(fused.shape[-1])
        _hold(bool((twice == fused).all() and ahead.all()), "fusion", "no map to later tokens")
        if qs.fusion is not None and qs.fusion.window == 1:
            rising = (np.diff(fused, axis=-1) >= 0).all()
            _hold(bool(rising), "fusion", "runs of adjacent tokens are out of order")
    if qs.amq is not None:
        kept = (record.bits[qs.amq.layer :] == record.bits[-1]).all()
        _hold(bool(kept and (record.bits[: qs.amq.layer] == 16).all()), "bits", "they change")
    held = (record.kv_held <= record.kv_written).all()
    _hold(bool(held), "cache", "a key is held that was never written")


def check_exempt(runs: Runs) -> None:
    """Law 4: where every token is exempt, the numbers are the dense model's."""
    qs = runs.cfg.quicksilver
    if qs is None or qs.amq is not None:  # exempt tokens keep 8 bits
        return
    exempt = dataclasses.replace(qs, sink_tokens=max(map(len, runs.rows)))
    given: Any = {"prompt_lengths": runs.prompts} if runs.continues else {}
    found = score(runs.params, runs.rows, runs.cfg.replace(quicksilver=exempt), **given)
    dense = score(runs.params, runs.rows, runs.cfg.replace(quicksilver=None), **given)
    far = float(np.abs(found.logprobs - dense.logprobs)[dense.mask & found.mask].max())
    _hold(far <= runs.tolerance, "off is dense", f"exempt tokens are {far:.2g} from it")
