"""What each section of a run measures, row by row."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

import qs_jax
from benchmarks import trace
from benchmarks.gpu import models
from benchmarks.gpu.models import Sizes, Subject
from benchmarks.gpu.rows import Entry, Run
from benchmarks.latency_rows import OurCall, hugging_face
from benchmarks.timing import Measure, run_in_turn, watch
from convert import flax_to_hf
from qs_jax import presets
from qs_jax.config import Config, ModelConfig
from qs_jax.engine.attention import blocked_attention
from qs_jax.errors import InputError
from qs_jax.load import find_checkpoint

DTYPES = ("float32", "bfloat16")
# Longest that the rounds of a group take, in seconds, warm-up aside; one is made whatever it takes.
GROUP_SECONDS = 25.0
IMPLEMENTATIONS = ("library", "xla", "cudnn")


class Bench:
    """The sections of one run; each writes its rows into the file by itself."""

    def __init__(self, run: Run, ckpt: Path, sizes: Sizes, folder: Path) -> None:
        self.run, self.ckpt, self.sizes, self.folder = run, ckpt, sizes, folder

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """Token ids of the text that prompts are made of."""
        return models.passage(self.ckpt)

    @functools.cached_property
    def small(self) -> Subject:
        """The embedded model."""
        return models.embedded(self.ckpt, self.sizes.new_tokens)

    def _prompts(self, model: ModelConfig, batch: int, length: int) -> np.ndarray:
        """Prompts of a size, cut where the new tokens would not fit."""
        length = min(length, model.max_positions - self.sizes.new_tokens)
        return models.repeated(self.ids, batch, length, model.vocab_size)

    # --- parity ---------------------------------------------------------------------------------

    def parity(self) -> None:
        """Logits and decisions on the device against those of this process's CPU."""
        for name, compare in (("dense", _compare_logits), ("balanced", _compare_decisions)):
            for dtype in DTYPES:
                measure = functools.partial(self._parity, name, dtype, compare)
                self.run.row("parity", f"{name} {dtype}", measure)

    def _parity(self, name: str, dtype: str, compare: Callable[[Any, Any], Entry]) -> Entry:
        found, devices = [], (jax.devices()[0], jax.devices("cpu")[-1])
        for device in devices:
            exact = jax.default_matmul_precision("highest")
            # bfloat16 is compared as it is run.
            precision = exact if dtype == "float32" else contextlib.nullcontext()
            with jax.default_device(device), precision:
                params, model = qs_jax.load(self.ckpt, dtype=dtype)
                tokens = models.repeated(self.ids, 1, self.sizes.parity, model.vocab_size)
                cfg = Config(model)
                if name != "dense":
                    acting = {"protocol": "continuation"}
                    acting["continuation_tokens"] = self.sizes.new_tokens
                    cfg = presets.config(name, model, **acting)
                found.append(qs_jax.score(params, tokens, cfg, return_logits=name == "dense"))
        named = [f"{device.device_kind} {device.id}" for device in devices]
        facts = {"device": named[0], "reference": named[1], "tokens": tokens.size}
        return facts | compare(*found)

    # --- times of models ------------------------------------------------------------------------

    def embedded(self) -> None:
        """Prefill and decoding of the embedded model."""
        self._times("embedded", self.small)

    def llama(self) -> None:
        """Prefill and decoding of random weights."""
        self._times("llama-7b", models.large(self.sizes.large, self.sizes.new_tokens))

    def _times(self, section: str, subject: Subject) -> None:
        for batch, length in self.sizes.prompts:
            self._group(section, subject, batch, length)

    def _group(self, section: str, subject: Subject, batch: int, length: int) -> None:
        """Calls of one size: each is compiled, then all are timed in turn with the dense one."""
        tokens = self._prompts(subject.model, batch, length)
        calls: dict[str, Measure] = {}

        def warm(name: str, cfg: Config) -> Entry:
            call = OurCall(subject.params(), tokens, "decode", cfg)
            told = call.warm()
            calls[name] = call
            return told

        facts: Entry = {"batch": batch, "prompt_tokens": tokens.shape[1]}
        facts["new_tokens"] = self.sizes.new_tokens
        for name, cfg in subject.calls.items():
            told = facts | {"mechanism": models.mechanism(cfg)}
            measure = functools.partial(warm, name, cfg)
            self.run.row(section, f"{_size(tokens)} {name}", measure, **told)
        self._in_turn(section, {name: f"{_size(tokens)} {name}" for name in calls}, calls)

    def _in_turn(self, section: str, names: dict[str, str], calls: dict[str, Measure]) -> None:
        """Time calls in turn with the first of them, and note each in the row of its name."""
        if not calls:
            return
        baseline = next(iter(calls))
        seconds = min(GROUP_SECONDS, self.run.seconds_left)
        how: dict[str, Any] = {"baseline": baseline, "least": 1, "seconds": seconds}
        found = self.run.attempt(lambda: run_in_turn(calls, self.sizes.rounds, **how))
        for name, row in names.items():
            self.run.note(section, row, {"baseline": baseline} | found.get(name, found))

    # --- attention ------------------------------------------------------------------------------

    def attention(self) -> None:
        """Causal attention of whole prompts: what the library runs, and JAX's own."""
        for owner, model in (("embedded", self.small.model), ("llama-7b", self.sizes.large)):
            for batch, length in self.sizes.prompts:
                self._attention(f"{owner} {batch}x{length}", model, batch, length)

    def _attention(self, size: str, model: ModelConfig, batch: int, length: int) -> None:
        calls: dict[str, Measure] = {}
        outputs: dict[str, jax.Array] = {}

        def warm(name: str) -> Entry:
            keys = jax.random.split(jax.random.key(0), 3)
            made = [
                jax.random.normal(key, (batch, length, heads, model.head_dim), jnp.bfloat16)
                for key, heads in zip(keys, _heads(model), strict=True)
            ]
            attend = jax.jit(_attend(name))
            outputs[name] = jax.block_until_ready(attend(*made))
            calls[name] = _timed(lambda: attend(*made))
            if len(outputs) == 1:
                return {}
            difference = _difference(outputs[name], next(iter(outputs.values())))
            return {"against": next(iter(outputs)), "max_difference": float(difference)}

        for name in IMPLEMENTATIONS:
            facts = {"heads": _heads(model)[0], "kv_heads": _heads(model)[1]}
            facts |= {"batch": batch, "tokens": length, "head_dim": model.head_dim}
            measure = functools.partial(warm, name)
            self.run.row("attention", f"{size} {name}", measure, **facts)
        outputs.clear()
        self._in_turn("attention", {name: f"{size} {name}" for name in calls}, calls)

    # --- trace and torch ------------------------------------------------------------------------

    def trace(self) -> None:
        """Seconds by scope of one prefill under `balanced`; the trace goes beside the file."""
        batch, length = self.sizes.prompts[min(1, len(self.sizes.prompts) - 1)]
        model = self.small.model
        tokens = self._prompts(model, batch, length)

        def measure() -> Entry:
            call = self._first_token("balanced", tokens)
            seconds = trace.profile(call, folder=self.folder)
            if set(seconds) == {"idle"}:
                raise InputError("the trace holds no operation of the programs that ran.")
            return {"seconds_by_scope": seconds, "folder": self.folder.name}

        facts = {"batch": batch, "prompt_tokens": tokens.shape[1]}
        self.run.row("trace", f"{_size(tokens)} balanced", measure, **facts)

    def torch(self) -> None:
        """The same weights in Hugging Face torch: prefill in bfloat16, in turn with ours."""
        batch, length = self.sizes.prompts[0]
        tokens = self._prompts(self.small.model, batch, length)
        calls: dict[str, Measure] = {}

        def warm_dense() -> Entry:
            call = self._first_token("dense", tokens)
            call()  # compiles

            def once() -> dict[str, float]:
                with watch() as seen:
                    call()
                return {"seconds": seen.seconds}

            calls["dense"] = once
            return {}

        def warm_torch() -> Entry:
            _require_torch()
            with tempfile.TemporaryDirectory() as folder:
                source = flax_to_hf.export(find_checkpoint(self.ckpt), Path(folder) / "hf")
                call = hugging_face(source, "bfloat16", "prefill", tokens, 1)
            call()
            calls["HF sdpa bfloat16"] = lambda: {"seconds": call()["seconds"]}
            return {}

        facts = {"batch": batch, "prompt_tokens": tokens.shape[1]}
        for name, warm in {"dense": warm_dense, "HF sdpa bfloat16": warm_torch}.items():
            self.run.row("torch", f"{_size(tokens)} {name}", warm, **facts)
        self._in_turn("torch", {name: f"{_size(tokens)} {name}" for name in calls}, calls)

    def _first_token(self, name: str, tokens: np.ndarray) -> Callable[[], Any]:
        """A prefill: the program that the timed calls of this size begin with."""
        params, cfg = self.small.params(), self.small.calls[name]
        return lambda: next(qs_jax.stream(params, tokens, cfg))


def _size(tokens: np.ndarray) -> str:
    return f"{tokens.shape[0]}x{tokens.shape[1]}"


def _compare_logits(ours: qs_jax.ScoreOutput, reference: qs_jax.ScoreOutput) -> Entry:
    a, b = (np.asarray(out.logits[0], np.float64) for out in (ours, reference))
    logq, logp = log_softmax(a, axis=-1), log_softmax(b, axis=-1)
    return {
        "max_difference": float(np.abs(a - b).max()),
        "largest_logit": float(np.abs(b).max()),
        "mean_kl": float((np.exp(logp) * (logp - logq)).sum(-1).mean()),
        "same_likeliest_token": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


def _compare_decisions(ours: qs_jax.ScoreOutput, reference: qs_jax.ScoreOutput) -> Entry:
    """Log-probabilities after the prompt; which layers each token ran, and which keys it has."""
    a, b = ours.record, reference.record
    equal = (a.active == b.active) & (a.kv_written == b.kv_written)
    return {
        "max_difference": float(np.abs(ours.logprobs - reference.logprobs).max()),
        "equal_decisions": float(equal.mean()),
        "layer_tokens_saved": a.layer_tokens_saved,
    }


def _heads(model: ModelConfig) -> tuple[int, int, int]:
    """Heads of queries, keys and values."""
    return model.num_heads, model.num_kv_heads, model.num_kv_heads


def _attend(name: str) -> Callable[..., jax.Array]:
    if name == "library":
        return blocked_attention
    return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=name)


@jax.jit
def _difference(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max()


def _timed(call: Callable[[], Any]) -> Measure:
    def run() -> dict[str, float]:
        began = time.perf_counter()
        jax.block_until_ready(call())
        return {"seconds": time.perf_counter() - began}

    return run


def _require_torch() -> None:
    """Refuse a comparison that would have torch on another device than JAX."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name} is not installed.")
    import torch

    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        raise InputError("torch is installed without CUDA, or finds no GPU.")
