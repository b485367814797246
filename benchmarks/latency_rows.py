"""What `benchmarks.latency` times: calls of ours, the same weights in Hugging Face, and a read."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import qs_jax
from benchmarks.timing import Measure, watch
from qs_jax import accounting, presets
from qs_jax.config import (
    GREEDY,
    Config,
    HaltingConfig,
    KVSkipConfig,
    ModelConfig,
    QuickSilverConfig,
)
from qs_jax.engine.prompt_plan import runs_fast
from qs_jax.mechanisms.kv_maps import sizes_of
from qs_jax.models import Params
from qs_jax.timing import Stopwatch

# A decode's limit, timed in turn with the others: the bandwidth of a shared machine changes from
# minute to minute.
READ_ROW = "weights and cache read once, float32"
FRACTIONS = (0.75, 0.5, 0.25)
NEVER = float("-inf")
Sizes = tuple[int, ...]


class Group(NamedTuple):
    """Rows that are timed in turn on the same prompts, "dense" among them.

    `section` is "prefill" or "decode". With `beside`, also the other dtype, Hugging Face and, of a
    decode, the read of its bytes. `ends` is when the rounds of a quick run should end, in minutes
    after its start.
    """

    section: str
    batch: int
    length: int
    rows: dict[str, Config]
    beside: bool = True
    ends: float | None = None

    @property
    def key(self) -> str:
        """Its name in the JSON file."""
        return f"{self.section} {self.batch}x{self.length}"


def active(model: ModelConfig, fraction: float) -> QuickSilverConfig:
    """Leave this share of a prompt's tokens active from a third of the depth on.

    Nothing is exempt but the last token, which is read out: the share is nearly exact.
    """
    halting: dict[str, Any] = {"rule": "quota", "quota": (1 - fraction,), "score": "random"}
    return _forced(max(model.num_layers // 3, 1), **halting)


def half_depth(model: ModelConfig) -> QuickSilverConfig:
    """Every token leaves in the middle, prompt and new ones alike, and has no deeper keys."""
    return _forced(max(model.num_layers // 2, 1), tau_drift=float("inf"))


def _forced(layer: int, **halting: Any) -> QuickSilverConfig:
    none = {"protect_special": False, "sink_tokens": 0, "recent_tokens": 1}
    rule = HaltingConfig(layers=(layer,), entropy=None, **halting)
    return QuickSilverConfig(halting=rule, kv_skip=KVSkipConfig("skip"), **none)


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


def rows(section: str, model: ModelConfig, names: tuple[str, ...], new: int) -> dict[str, Config]:
    """Calls of a group: greedy, without an end token. A prefill yields its one new token itself.

    Presets act on the prompts of a prefill; a decode leaves out what no fast engine runs.
    """
    # The dual rule, tested at every layer, met by nobody.
    unmet = HaltingConfig(tau_drift=NEVER, entropy=None)
    mechanisms = {"off": presets.off(model)}
    mechanisms["unmet thresholds"] = QuickSilverConfig(unmet, KVSkipConfig("skip"))
    for name in names:
        mechanisms[name] = presets.by_name(name, model)
        halting = mechanisms[name].halting
        light = halting is not None and halting.light_from is not None  # decides by one product
        if section == "prefill" and not light:
            mechanisms[f"{name}, decisions only"] = decisions_only(mechanisms[name])
    fractions = (1.0, *FRACTIONS) if section == "prefill" else FRACTIONS[1:]
    mechanisms |= {f"active {fraction:g}": active(model, fraction) for fraction in fractions}
    if section == "decode":
        mechanisms["half depth"] = half_depth(model)
    count = 1 if section == "prefill" else new
    dense = Config(model, max_new_tokens=count, eos_token_ids=(), **GREEDY)
    acting = {"protocol": "continuation"} if section == "prefill" else {}
    calls = {name: dense.replace(quicksilver=qs, **acting) for name, qs in mechanisms.items()}
    return {"dense": dense} | {n: c for n, c in calls.items() if runs_fast(c, generates=True)}


def grid(
    model: ModelConfig, names: tuple[str, ...], batches: Sizes, lengths: Sizes, new: int
) -> Iterator[Group]:
    """Every group of a full run that fits the model, the headline's first."""
    sizes = [(batch, length) for length in lengths for batch in batches]
    for section, first in (("prefill", [(4, 512), (8, 512)]), ("decode", [])):
        for batch, length in dict.fromkeys([*first, *sizes]):
            if length + new <= model.max_positions:
                yield Group(section, batch, length, rows(section, model, names, new))


def quick_grid(model: ModelConfig, names: tuple[str, ...], new: int) -> Iterator[Group]:
    """What the headline needs, in under ten minutes with the profiles that follow."""
    prefill, decode = (rows(section, model, names, new) for section in ("prefill", "decode"))
    shares = [f"active {fraction:g}" for fraction in FRACTIONS]
    # Of presets by thresholds; the profiles run the same programs.
    deciding = [n for n in names if not presets.by_name(n, model).prompts_only]
    deciding = [f"{name}, decisions only" for name in deciding]
    first = ["dense", "off", "unmet thresholds", *deciding, *shares]
    yield Group("prefill", 4, 512, {name: prefill[name] for name in first}, ends=3.4)
    second = {name: prefill[name] for name in ("dense", *shares)}
    yield Group("prefill", 8, 512, second, beside=False, ends=5.7)
    third = {name: decode[name] for name in ("dense", "half depth")}
    yield Group("decode", 1, 128, third, ends=7.6)


class OurCall:
    """A public call of ours, to be timed again and again.

    Times: "seconds" in its programs, "call_seconds" for all of it (checks, padding, record). A
    decode is what follows the prefill's program, over N - 1 tokens; "prefill_seconds" is the rest.
    """

    def __init__(self, params: Params, rows_NT: np.ndarray, section: str, cfg: Config) -> None:
        self._params, self._rows, self._cfg, self._section = params, rows_NT, cfg, section

    def warm(self) -> dict[str, Any]:
        """Compile; what there is to say about the call besides its time, FLOPs from its record."""
        cfg = self._cfg
        with watch() as seen, Stopwatch() as stopwatch:
            out = qs_jax.generate(self._params, self._rows, cfg)
        prompts = np.full(len(self._rows), self._rows.shape[1], np.int32)
        steps = cfg.max_new_tokens - 1 if self._section == "decode" else 0
        record, qs = out.record, cfg.quicksilver
        if record is None:
            record, qs = accounting.dense_record(prompts + steps, prompts, cfg.model), None
        tally = accounting.tally(record, cfg.model, qs, sizes_of(self._params))
        counted, prompt = tally[self._section], tally["prefill"]
        whole, ours = counted["exact_flops_dense"], counted["exact_flops"]
        held = float(record.kv_held.sum()) / (len(record.kv_held) * float(record.lengths.sum()))
        return {
            "compile_seconds": stopwatch.compile,
            "memory": seen.memory(),
            "dtype": cfg.model.dtype,
            "kv_bytes": out.kv_bytes,
            "exact_flops_dense": whole,
            "exact_flops": ours,
            "exact_flops_saved": 1 - ours / whole,
            "prompt_flops_saved": 1 - prompt["exact_flops"] / prompt["exact_flops_dense"],
            "layer_tokens_saved": record.layer_tokens_saved,
            "kv_skip_rate": 1 - held,
            "tokens_per_pass": float((out.lengths - 1).sum() / max(out.passes.sum(), 1)),
        }

    def __call__(self) -> dict[str, float]:
        """Run it once; times in seconds."""
        decodes, cfg = self._section == "decode", self._cfg
        began = time.perf_counter()
        with watch() as seen:
            qs_jax.generate(self._params, self._rows, cfg)
        times = {"call_seconds": time.perf_counter() - began, "seconds": seen.seconds}
        if not decodes:
            return times
        # The program that ends with each row's first token.
        prefill, steps = seen.spent["start"], cfg.max_new_tokens - 1
        per_token = {name: (value - prefill) / steps for name, value in times.items()}
        return per_token | {"prefill_seconds": prefill}


def step_bytes(batch: int, length: int, about: dict[str, Any]) -> int:
    """What a decoding step in float32 reads at least: every weight, key and value, once.

    The context is the prompt and, on average, half of the new tokens.
    """
    context = length + about["new_tokens"] / 2
    own = about["weight_bytes"] + batch * context * about["kv_bytes_per_token"]
    return int(own * (1 if about["dtype"] == "float32" else 2))


def read(size: int) -> Measure:
    """Reads so many bytes once, as fast as JAX sums them; the shortest of three reads."""
    array, total = jnp.ones(max(size // 4, 1), jnp.float32), jax.jit(jnp.sum)

    def run() -> dict[str, float]:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            jax.block_until_ready(total(array))
            times.append(time.perf_counter() - began)
        return {"seconds": min(times), "call_seconds": min(times)}

    return run


def hugging_face(folder: Path, dtype: str, section: str, rows_NT: np.ndarray, new: int) -> Measure:
    """The same weights in torch, with SDPA attention: a prefill, or a decode as of `OurCall`.

    Results come back to the host, which waits for them.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model.generation_config = GenerationConfig()  # no end token, no sampling
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    tokens = torch.tensor(rows_NT, dtype=torch.long, device=device)
    times: list[float] = []

    def note(input_ids: Any, scores: Any, **_: Any) -> Any:
        """A stopping criterion that stops nothing and notes when each token was there."""
        del scores
        stops = input_ids[:, -1] != input_ids[:, -1]
        stops.cpu()  # waits for the token
        times.append(time.perf_counter())
        return stops

    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    settings |= {"attention_mask": torch.ones_like(tokens), "stopping_criteria": [note]}

    def run() -> dict[str, float]:
        times.clear()
        began = time.perf_counter()
        with torch.inference_mode():
            if section == "prefill":
                model(tokens, logits_to_keep=1, use_cache=True).logits.cpu()
                seconds = time.perf_counter() - began
                return {"seconds": seconds, "call_seconds": seconds}
            model.generate(tokens, **settings)
        seconds = (times[-1] - times[0]) / (new - 1)
        before = times[0] - began
        return {"seconds": seconds, "call_seconds": seconds, "prefill_seconds": before}

    return run
