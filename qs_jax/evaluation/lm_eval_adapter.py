"""The model `qs-jax` of the EleutherAI lm-evaluation-harness (Gao et al. 2023).

Model arguments are those of `QSJaxLM`: `ckpt=DIR,preset=balanced,...`. The context of a request is
the prompt of protocol "continuation".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from qs_jax import accounting, presets
from qs_jax.config import Config, Speculation
from qs_jax.engine.devices import local_devices, place
from qs_jax.engine.generate import generate
from qs_jax.engine.inputs import bucket_size
from qs_jax.engine.stops import cut
from qs_jax.errors import InputError, NonFiniteError
from qs_jax.evaluation.rows import Pair, ScoredBatch, score_rows
from qs_jax.load import find_checkpoint, find_maps, load, load_tokenizer
from qs_jax.models import Params, count_params, head

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import Collator, normalize_gen_kwargs
except ImportError as error:
    raise InputError(
        "lm-evaluation-harness is not installed: pip install 'qs-jax[lm-eval]'."
    ) from error

# Settings of Hugging Face models that change nothing at these values.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}
# Those that a request may name; else the checkpoint's hold, as for Hugging Face models.
_FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")


@register_model("qs-jax")
class QSJaxLM(TemplateLM):
    """A checkpoint under a preset, with the options of the command line.

    Args:
      ckpt: Checkpoint, as `qs_jax.load` takes it.
      preset: A name, or FILE.json.
      protocol: As `Config.protocol`.
      engine: As `Config.engine`.
      kv_maps: Of the "extrapolate" policy; by default as the command line finds them.
      allow_other_weights: Take a preset and maps that were made for other weights.
      dtype: As `qs_jax.load`.
      batch_size: Rows at a time.
      devices: Local devices that share each batch: a number, "all", or "2x4" for a mesh.
      max_length: Longest row in tokens; by default the model's positions.
      max_gen_toks: Longest continuation of requests that do not say.
      seed: Of the sampler.
      device: Ignored: the harness always gives one, and JAX_PLATFORMS decides.
      max_batch_size: Refused: there are no automatic batch sizes.
      speculate: Draft and verify new tokens; the preset fast-answers does so by itself.
      weights: As `qs_jax.load` takes it.
      revision: Of a hub id.
    """

    def __init__(
        self,
        ckpt: str,
        preset: str = "off",
        protocol: str | None = None,
        engine: str = "auto",
        kv_maps: str | None = None,
        allow_other_weights: bool = False,
        dtype: str | None = "auto",
        batch_size: int | str = 1,
        devices: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        speculate: bool = False,
        weights: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        del device
        if max_batch_size is not None or not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"--batch_size must be a number for qs-jax, got {batch_size!r}.")
        self.folder = find_checkpoint(ckpt, revision)
        self.tokenizer: Any = load_tokenizer(self.folder)
        self.devices = local_devices(devices)
        mesh = self.devices if isinstance(self.devices, Mesh) else None
        params, model = load(self.folder, dtype=dtype, weights=weights, devices=mesh)
        model = model.replace(weights=None) if allow_other_weights else model
        settings: dict[str, Any] = {"protocol": protocol, "engine": engine}
        if speculate:
            settings["speculate"] = Speculation()
        self.cfg = presets.config(preset, model, **settings)
        file = Path(kv_maps) if kv_maps else None
        maps, _ = find_maps(self.cfg, self.folder, file, preset)
        params = params if maps is None else {**params, "kv_maps": maps}
        self.params: Params = place(params, self.devices)
        self.batch_size = int(batch_size)
        most = model.max_positions
        self.max_length = most if max_length is None else min(max_length, most)
        if self.max_length < 2:
            raise InputError(f"max_length must be at least 2, got {max_length}.")
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.preset = Path(preset).name
        self.counts: dict[str, Any] | None = None
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ends = self.cfg.model.eos_token_ids or (self.tokenizer.eos_token_id,)
        if ends[0] is None:
            raise InputError("the checkpoint has no end token.")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The beginning token or else the end token: it stands for an empty context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """Keeps request caches of different checkpoints apart."""
        return str(self.folder).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; a text that begins with the beginning token gets no second one."""
        start = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (start and string.startswith(start))
        options = {"add_special_tokens": add_special_tokens, "verbose": False}
        return list(self.tokenizer(string, **options).input_ids)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text, by the tokenizer's template."""
        if self.tokenizer.chat_template is None:
            raise InputError("this checkpoint has no chat template.")
        options = {"continue_final_message": not add_generation_prompt, "tokenize": False}
        return self.tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt, **options
        )

    def get_model_info(self) -> dict[str, Any]:
        """Settings, and what scoring saved so far, for the harness's results file."""
        assert self.cfg.quicksilver is not None
        settings = {
            "preset": self.preset,
            "protocol": self.cfg.effective_protocol,
            "engine": self.cfg.engine,
            "quicksilver": self.cfg.quicksilver.to_dict(),
            "contexts_truncated": self.truncated,
            "saved_scoring": self.counts and accounting.summary(self.counts),
        }
        size = {"model_num_parameters": count_params(self.cfg.model)}
        return size | {"model_dtype": self.cfg.model.dtype, "qs_jax": settings}

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations of contexts, and whether each is the greedy one."""
        asked = [(request.args, *self._encode_pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(asked, disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what follows it, tokenised together.

        White space at the end of a context belongs to what follows, as in the harness. Unlike there
        a token that holds the end of the one and the beginning of the other does too: it would
        belong to neither.
        """
        if not context.strip():
            return [], self.tok_encode(context + continuation, add_special_tokens=False)
        whole, before = self.tok_encode(context + continuation), self.tok_encode(context.rstrip())
        same = [a == b for a, b in zip(before, whole, strict=False)]
        shared = [*same, False].index(False)
        return whole[:shared], whole[shared:]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Any, Any]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fit(context, after) for _, context, after in requests]
        # Continuations of one token after the same context share a row.
        shared: dict[Any, list[int]] = {}
        for index, (context, after) in enumerate(pairs):
            key = (tuple(context), tuple(after) if len(after) > 1 else None)
            shared.setdefault(key, []).append(index)
        members = list(shared.values())
        rows = [pairs[indices[0]] for indices in members]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        options = {"batch_size": self.batch_size, "devices": self.devices}
        with tqdm(total=len(rows), desc="loglikelihood", disable=disable_tqdm) as bar:
            for batch in score_rows(self.params, rows, self.cfg, return_states=True, **options):
                targets = [(row, i) for row, at in enumerate(batch.index) for i in members[at]]
                read = self._read(batch, [(row, *pairs[i]) for row, i in targets])
                for (_row, index), result in zip(targets, read, strict=True):
                    if not np.isfinite(result[0]):
                        raise NonFiniteError(
                            f"the log-likelihood of request {index} is {result[0]}: the weights "
                            "hold NaN or infinity, or the dtype overflows; try dtype=float32."
                        )
                    results[index] = result
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
                counts = batch.counts
                self.counts = accounting.add(self.counts, counts) if self.counts else counts
                bar.update(len(batch.index))
        return results

    def _fit(self, context: list[int], after: list[int]) -> Pair:
        """A context of at least one token, its beginning cut where it leaves no room for the rest.

        In place of no tokens stands the prefix token: the first of what follows, or one before it.
        """
        if not context:
            first, given = self.prefix_token_id, after[:1] == [self.prefix_token_id]
            context, after = [first], after[1:] if given else after
        most = self.max_length - 1
        if not 1 <= len(after) <= most:
            raise InputError(f"a continuation must have 1 to {most} tokens, got {len(after)}.")
        return self._cut(context, self.max_length - len(after)), after

    def _cut(self, context: list[int], room: int) -> list[int]:
        self.truncated += len(context) > room
        return context[-room:]

    def _read(self, batch: ScoredBatch, targets: list[Any]) -> Iterator[tuple[float, bool]]:
        """Log-likelihood of each (row, context, continuation), and whether it is the greedy one."""
        assert batch.out.states is not None
        before = [
            batch.out.states[row, len(context) - 1 :][: len(after)]
            for row, context, after in targets
        ]
        ids_M = np.concatenate([after for _, _, after in targets])
        pad = bucket_size(len(ids_M)) - len(ids_M)
        h_1MD = np.pad(np.concatenate(before), ((0, pad), (0, 0)))[None]
        h_1MD = jnp.asarray(h_1MD, self.cfg.model.dtype)
        read_1M2 = _read_tokens(self.params, h_1MD, jnp.asarray(np.pad(ids_M, (0, pad)))[None])
        ends = np.cumsum([len(after) for _, _, after in targets])
        for part_C2 in np.split(np.asarray(read_1M2[0], np.float64), ends)[:-1]:
            yield float(part_C2[:, 0].sum()), bool(part_C2[:, 1].all())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once.

        The beginning token is given, not predicted, as where a text continues an empty context; the
        harness's "hf" model does so under `add_bos_token=False` and else predicts it too.
        Teacher-forced in windows of the model's length, as there; under "continuation" in blocks,
        each with all before it that fits as its prompt.
        """
        windows = [self._windows(self._encode_pair("", r.args[0])[1]) for r in requests]
        flat = [(None, *window) for each in windows for window in each]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm) if flat else [])
        totals = [sum((next(scores)[0] for _ in each), 0.0) for each in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        first, longest = self.prefix_token_id, self.max_length
        ids = ids[1:] if ids[:1] == [first] else ids
        if self.cfg.effective_protocol != "continuation":
            windows = utils.get_rolling_token_windows(ids, first, longest - 1, 1)
            return [utils.make_disjoint_window(window) for window in windows]
        block, text = min(128, longest // 2), [first, *ids]
        ends = range(1, len(text), block)
        return [(text[max(end + block - longest, 0) : end], text[end:][:block]) for end in ends]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until a stop string, an end token or the token limit."""
        for request in requests:
            self._settings(request.args[1])
        arguments = [request.args for request in requests]
        groups, texts = Collator(arguments, lambda args: -len(args[0]), group_by="gen_kwargs"), []
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            batches: Any = groups.get_batched(self.batch_size)
            for number, batch in enumerate(batches):
                cfg = self._settings(batch[0][1])
                contexts = [self.tok_encode(text) or [self.prefix_token_id] for text, _ in batch]
                rows = [self._cut(ids, self.max_length - cfg.max_new_tokens) for ids in contexts]
                cfg = cfg.replace(seed=(self.seed + number) % 2**32)
                given = {"tokenizer": self.tokenizer, "devices": self.devices}
                out = generate(self.params, rows, cfg, **given)
                new = zip(out.tokens, out.lengths, strict=True)
                decoded = [cut(self._text(ids[:size].tolist()), cfg.stop) for ids, size in new]
                for args, text in zip(batch, decoded, strict=True):
                    texts.append(text)
                    self.cache_hook.add_partial("generate_until", args, text)
                bar.update(len(batch))
        return groups.get_original(texts)

    def _settings(self, request: dict[str, Any]) -> Config:
        """How to generate what a request asks for."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(request, self.max_gen_toks))
        until = [stop for stop in kwargs.pop("until") if stop]
        length, samples = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
        temperature = kwargs.pop("temperature", self.cfg.sampling.temperature or 1.0)
        filters: dict[str, Any] = {name: kwargs.pop(name, None) for name in _FILTERS}
        if filters["top_k"] is not None:
            filters["top_k"] = max(filters["top_k"], 0)  # some say -1 for all tokens
        if other := {k: v for k, v in kwargs.items() if k not in _NEUTRAL or v != _NEUTRAL[k]}:
            raise InputError(f"generation settings that qs-jax does not have: {other}.")
        most = self.max_length - 1
        if not 1 <= length <= most:
            raise InputError(f"max_gen_toks must lie between 1 and {most}, got {length}.")
        stops = {*self.cfg.stop_ids, self.eot_token_id}
        return self.cfg.replace(
            max_new_tokens=length,
            stop=tuple(until),
            temperature=temperature if samples else 0.0,
            eos_token_ids=tuple(sorted(stops)),
            **filters,
        )

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@jax.jit
def _read_tokens(params: Params, h_BTD: Array, ids_BT: Array) -> Array:
    """Log-probability of a token after each state, and 1 where it is the likeliest: `[B, T, 2]`."""

    def chunk(h_BCD: Array, ids_BC: Array) -> Array:
        logprobs_BCV = jax.nn.log_softmax(head.logits(params, h_BCD))
        token_BC = jnp.take_along_axis(logprobs_BCV, ids_BC[..., None], axis=-1)[..., 0]
        best_BC = jnp.argmax(logprobs_BCV, axis=-1) == ids_BC
        return jnp.stack([token_BC, best_BC.astype(token_BC.dtype)], axis=-1)

    return head.map_positions(chunk, head.head_table(params).shape[0], h_BTD, ids_BT)
