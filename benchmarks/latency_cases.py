"""Which calls `benchmarks.latency` times, and at which sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from qs_jax import presets
from qs_jax.config import Config, HaltingConfig, KVSkipConfig, ModelConfig, QuickSilverConfig

FRACTIONS = (1.0, 0.75, 0.5, 0.25)
SHIPPED = ("paper", "balanced", "aggressive")
HEADLINE = ((4, 512), (8, 512))
NEVER = float("-inf")
# Longest rows at which the masked engine, which computes whole attention weights, is timed too.
MASKED_LENGTH = 1024
# Prompts of so many tokens, of all rows: a run takes long. Rows that save nothing are left out, and
# so is the other dtype; prefills are those inside the decode's calls. Not at the headline's sizes.
LONG = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a configuration of ours.

    Attributes:
      name: Its key in the JSON file.
      cfg: Mechanisms, engine, budget.
      baseline: Name of the dense row it is compared with.
    """

    name: str
    cfg: Config
    baseline: str = "dense"


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that are timed in turn, on the same tokens.

    Attributes:
      section: "prefill", "scoring" or "decode".
      batch: Rows of tokens.
      length: Tokens of each prompt (or scored row).
      cases: Ours.
      hf: Time Hugging Face too.
      ends: Minutes after the run's start by which its rounds should end, of a quick run.
    """

    section: str
    batch: int
    length: int
    cases: tuple[Case, ...]
    hf: bool = True
    ends: float | None = None

    @property
    def key(self) -> str:
        """Its name in the JSON file."""
        return key_of(self.section, self.batch, self.length)

    @property
    def long(self) -> bool:
        """Whether its prompts take long, as `is_long`."""
        return is_long(self.batch, self.length)


def is_long(batch: int, length: int) -> bool:
    """Whether so many prompts of this length have `LONG` tokens or more, and no headline."""
    return batch * length >= LONG and (batch, length) not in HEADLINE


def key_of(section: str, batch: int, length: int) -> str:
    """Name of a group."""
    return f"{section} {batch}x{length}"


def forced_fraction(model: ModelConfig, fraction: float) -> QuickSilverConfig:
    """Leave this share of a prompt's tokens active from a third of the depth on.

    Nothing is exempt but the last token, which is read out: the share is nearly exact.
    """
    layer = max(model.num_layers // 3, 1)
    return QuickSilverConfig(
        halting=HaltingConfig(
            rule="quota", layers=(layer,), quota=(1 - fraction,), score="random", entropy=None
        ),
        kv_skip=KVSkipConfig("skip"),
        protect_special=False,
        sink_tokens=0,
        recent_tokens=1,
    )


def half_depth(model: ModelConfig) -> QuickSilverConfig:
    """Every token leaves in the middle, prompt and new ones alike, and has no deeper keys."""
    layer = max(model.num_layers // 2, 1)
    return QuickSilverConfig(
        halting=HaltingConfig(tau_drift=float("inf"), entropy=None, layers=(layer,)),
        kv_skip=KVSkipConfig("skip"),
        protect_special=False,
        sink_tokens=0,
        recent_tokens=1,
    )


def unmet(model: ModelConfig) -> QuickSilverConfig:
    """The dual rule with a drift threshold that nobody meets: tested everywhere, stops nothing."""
    del model
    return QuickSilverConfig(
        halting=HaltingConfig(tau_drift=NEVER, entropy=None), kv_skip=KVSkipConfig("skip")
    )


def decisions_only(qs: QuickSilverConfig) -> QuickSilverConfig:
    """The same signals and tests with thresholds that stop, merge and skip nothing.

    Uniform bits need no signal and are left out. Bits by entropy keep their estimator and quantise
    the narrowest target, keys and values: "no bits" is not an outcome they have.
    """
    halting, fusion, amq = qs.halting, qs.fusion, qs.amq
    if halting is not None and halting.rule == "quota":
        halting = dataclasses.replace(halting, quota=(0.0,) * len(halting.quota))
    elif halting is not None:
        # The drift test comes first and spares the entropy: keep it as the preset has it, so that
        # as many entropies are computed, and let them all fail.
        halting = dataclasses.replace(halting, tau_halt=NEVER)
    if fusion is not None:
        fusion = dataclasses.replace(fusion, tau_fuse=NEVER)
    if amq is not None:
        amq = dataclasses.replace(amq, targets=("kv",)) if amq.entropy is not None else None
    return dataclasses.replace(qs, halting=halting, fusion=fusion, amq=amq)


def _fractions(model: ModelConfig, shares: tuple[float, ...], **kw: Any) -> Iterator[Case]:
    """What a quota leaves is known before the call: `dynamic` and `planned` are one program."""
    for fraction in shares:
        cfg = Config(model, forced_fraction(model, fraction), engine="compact", **kw)
        yield Case(f"active {fraction:g}", cfg)


def _engines(length: int) -> tuple[str, ...]:
    return ("masked", "compact") if length <= MASKED_LENGTH else ("compact",)


def prefill_cases(model: ModelConfig, names: tuple[str, ...], length: int) -> Iterator[Case]:
    """One new token, which the prefill itself yields."""
    one: dict[str, Any] = {"max_new_tokens": 1, "eos_token_ids": ()}
    yield Case("dense", Config(model, **one))
    yield Case("off", Config(model, presets.off(model), **one))
    yield Case("unmet thresholds", Config(model, unmet(model), **one))
    for name in names:
        qs = presets.by_name(name, model)
        for engine in _engines(length):
            yield Case(f"{name}, {engine}", Config(model, qs, engine=engine, **one))
        yield Case(f"{name}, decisions only", Config(model, decisions_only(qs), **one))
    yield from _fractions(model, FRACTIONS, **one)
    if length <= MASKED_LENGTH:
        half = forced_fraction(model, 0.5)
        yield Case("active 0.5, masked", Config(model, half, engine="masked", **one))


def scoring_cases(model: ModelConfig, names: tuple[str, ...], length: int) -> Iterator[Case]:
    """Whole rows; under "continuation" the last quarter is scored, by the dense model too."""
    tail: dict[str, Any] = {
        "protocol": "continuation",
        "continuation_tokens": min(128, max(length // 4, 1)),
    }
    yield Case("dense", Config(model))
    yield Case("dense, continuation", Config(model, **tail), "dense, continuation")
    for name in names:
        qs = presets.by_name(name, model)
        for engine in _engines(length):
            if qs.prompts_only:
                cfg = Config(model, qs, engine=engine, **tail)
                yield Case(f"{name}, {engine}", cfg, "dense, continuation")
            else:
                yield Case(f"{name}, {engine}", Config(model, qs, engine=engine))
    for case in _fractions(model, FRACTIONS, **tail):
        yield dataclasses.replace(case, baseline="dense, continuation")


def decode_cases(
    model: ModelConfig, names: tuple[str, ...], new_tokens: int, *, prefills: bool = False
) -> Iterator[Case]:
    """Greedy, no end token, so that every row yields as many.

    Args:
      model: Its settings.
      names: Presets.
      new_tokens: Made in each row.
      prefills: The rows of a prefill stand in for those that save nothing.
    """
    long: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_token_ids": ()}
    yield Case("dense", Config(model, **long))
    if not prefills:
        yield Case("off", Config(model, presets.off(model), **long))
    yield Case("half depth", Config(model, half_depth(model), **long))
    if not prefills:
        yield Case("unmet thresholds", Config(model, unmet(model), **long))
    for name in names:
        yield Case(name, Config(model, presets.by_name(name, model), **long))
    for fraction in FRACTIONS if prefills else (0.5, 0.25):
        yield Case(f"active {fraction:g}", Config(model, forced_fraction(model, fraction), **long))


def grid(
    model: ModelConfig,
    names: tuple[str, ...],
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    new_tokens: int,
) -> Iterator[Group]:
    """Every group of a full run, the headline's first."""
    sizes = dict.fromkeys((*HEADLINE, *((b, t) for t in lengths for b in batches)))
    for batch, length in sizes:
        if not is_long(batch, length):
            yield Group("prefill", batch, length, tuple(prefill_cases(model, names, length)))
    for length in lengths:
        for batch in batches:
            prefills = is_long(batch, length)
            cases = tuple(decode_cases(model, names, new_tokens, prefills=prefills))
            yield Group("decode", batch, length, cases)
    for batch, length in sizes:
        yield Group("scoring", batch, length, tuple(scoring_cases(model, names, length)))


def quick_grid(model: ModelConfig, names: tuple[str, ...], new_tokens: int) -> Iterator[Group]:
    """What the headline needs and no more, in under ten minutes with the profiles that follow."""
    one: dict[str, Any] = {"max_new_tokens": 1, "eos_token_ids": ()}
    dense, saving = Case("dense", Config(model, **one)), FRACTIONS[1:]
    cases = {case.name: case for case in prefill_cases(model, names, 512)}
    by_thresholds = [n for n in names if not presets.by_name(n, model).prompts_only]
    # The profiles run the same programs of decisions.
    deciding = (f"{n}, decisions only" for n in by_thresholds)
    kept = ["dense", "off", "unmet thresholds", *deciding]
    kept += [f"active {f:g}" for f in saving]
    yield Group("prefill", 4, 512, tuple(cases[name] for name in kept), ends=3.4)
    by_quota = tuple(_fractions(model, saving, **one))
    yield Group("prefill", 8, 512, (dense, *by_quota), hf=False, ends=5.7)
    decode = {case.name: case for case in decode_cases(model, names, new_tokens)}
    wanted = ("dense", "half depth")
    yield Group("decode", 1, 128, tuple(decode[name] for name in wanted), ends=7.6)
