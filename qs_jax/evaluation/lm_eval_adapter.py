"""The model `qs-jax` of the EleutherAI lm-evaluation-harness (Gao et al. 2023).

Model arguments are those of `QSJaxLM`: `ckpt=DIR,preset=balanced,...`. What a mechanism does to a
prompt, it does to the context of a request: contexts are the prompts of protocol "continuation".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from qs_jax import accounting, presets
from qs_jax.checkpoint import load, load_tokenizer
from qs_jax.config import Config
from qs_jax.engine.inputs import bucket_size
from qs_jax.engine.devices import local_devices, replicate
from qs_jax.engine.generate import stream
from qs_jax.errors import InputError
from qs_jax.evaluation.rows import ScoredBatch, score_rows
from qs_jax.mechanisms.shipped_maps import find_maps
from qs_jax.models import Params, count_params, head

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
except ImportError as error:
    raise InputError(
        "lm-evaluation-harness is not installed: pip install 'qs-jax[lm-eval]'."
    ) from error

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}


@register_model("qs-jax")
class QSJaxLM(TemplateLM):
    """A converted checkpoint under a preset.

    Args:
      ckpt: Folder written by convert.hf_to_flax.
      preset: A name, or FILE.json.
      protocol: "teacher-forced", "continuation", or None for what the preset can do.
      engine: As `Config.engine`.
      kv_maps: Of the "extrapolate" policy; by default as the command line finds them.
      dtype: As `qs_jax.load`.
      batch_size: Rows at a time.
      devices: Local devices that share each batch of a score: a number, or "all".
      max_length: Longest row in tokens; by default the model's positions.
      max_gen_toks: Longest continuation of requests that do not say.
      rolling_block: Under "continuation": a text is scored in blocks of so many tokens, each as
        the continuation of all that stands before it; by default 128, or half of `max_length`.
      add_bos_token: Put the beginning token before texts, or not; None does what the tokenizer
        does.
      seed: Of the sampler.
      device: The harness always gives one; here JAX_PLATFORMS decides, and it plays no part.
      max_batch_size: Of automatic batch sizes, which there are none of.

    Raises:
      InputError: An argument cannot be used.
    """

    def __init__(
        self,
        ckpt: str,
        preset: str = "off",
        protocol: str | None = None,
        engine: str = "auto",
        kv_maps: str | None = None,
        dtype: str | None = "auto",
        batch_size: int | str = 1,
        devices: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        rolling_block: int | None = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        del device
        if max_batch_size is not None or not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"--batch_size must be a number for qs-jax, got {batch_size!r}.")
        self.folder = Path(ckpt)
        self.tokenizer: Any = load_tokenizer(self.folder)
        params, model = load(self.folder, dtype=dtype)
        settings: dict[str, Any] = {"protocol": protocol, "engine": engine}
        self.cfg = Config(model, presets.by_name(preset, model), **settings)
        maps, _ = find_maps(self.cfg, self.folder, Path(kv_maps) if kv_maps else None, preset)
        if maps is not None:
            params["kv_maps"] = maps
        found = local_devices(str(devices))
        self.devices = found if len(found) > 1 else None
        self.params: Params = params if self.devices is None else replicate(params, found)
        self.batch_size = int(batch_size)
        self.max_length = min(max_length or model.max_positions, model.max_positions)
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.rolling_block = rolling_block or min(128, self.max_length // 2)
        if not 1 <= self.rolling_block < self.max_length:
            raise InputError(f"rolling_block must lie between 1 and {self.max_length - 1}.")
        self.add_bos_token = add_bos_token
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
        """What an empty context is: the beginning token, or the end token of models without."""
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
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        start = self.tokenizer.bos_token
        if add_special_tokens is None and start and string.startswith(start):
            special = False
        options: dict[str, Any] = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer(string, verbose=False, **options).input_ids)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text, by the tokenizer's template.

        Raises:
          InputError: There is none.
        """
        if self.tokenizer.chat_template is None:
            raise InputError("this checkpoint has no chat template.")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """Settings, and what scoring saved so far, for the harness's results file."""
        assert self.cfg.quicksilver is not None
        return {
            "model_num_parameters": count_params(self.cfg.model),
            "model_dtype": self.cfg.model.dtype,
            "qs_jax": {
                "preset": self.preset,
                "protocol": self.cfg.effective_protocol,
                "engine": self.cfg.engine,
                "quicksilver": self.cfg.quicksilver.to_dict(),
                "contexts_truncated": self.truncated,
                "saved_scoring": self.counts and accounting.summary(self.counts),
            },
        }

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        cut = [self._cut(context, after) for _, context, after in requests]
        # Continuations of one token after the same context share a row.
        shared: dict[Any, list[int]] = {}
        for index, (context, after) in enumerate(cut):
            key = (tuple(context), tuple(after) if len(after) > 1 else None)
            shared.setdefault(key, []).append(index)
        members = list(shared.values())
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        batches = score_rows(
            self.params,
            [cut[indices[0]] for indices in members],
            self.cfg,
            batch_size=self.batch_size,
            devices=self.devices,
            return_states=True,
        )
        with tqdm(total=len(members), desc="loglikelihood", disable=disable_tqdm) as bar:
            for batch in batches:
                wanted = [(row, i) for row, at in enumerate(batch.index) for i in members[at]]
                results = self._results(batch, [(row, *cut[i]) for row, i in wanted])
                for (_row, index), result in zip(wanted, results, strict=True):
                    found[index] = result
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
                done = self.counts
                self.counts = batch.counts if done is None else accounting.add(done, batch.counts)
                bar.update(len(batch.index))
        return found

    def _cut(self, context: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        """The end of the context that leaves room for what follows."""
        room = self.max_length - len(after)
        if not after:
            raise InputError("a continuation of the task has no tokens.")
        if room < 1:
            raise InputError(
                f"a continuation of {len(after)} tokens leaves no room for its context in "
                f"{self.max_length} positions."
            )
        self.truncated += len(context) > room
        return context[-room:], after

    def _results(
        self, batch: ScoredBatch, wanted: list[tuple[int, list[int], list[int]]]
    ) -> Iterator[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would produce it.

        Args:
          batch: Of `score_rows`, with states.
          wanted: Row of the batch, context and continuation of each request.
        """
        states = batch.out.states
        assert states is not None
        spans = [(len(context) - 1, len(context) + len(after) - 1) for _, context, after in wanted]
        read = [states[row, i:j] for (row, _, _), (i, j) in zip(wanted, spans, strict=True)]
        ids_M = np.concatenate([after for _, _, after in wanted])
        pad = bucket_size(len(ids_M)) - len(ids_M)
        h_1MD = jnp.asarray(np.pad(np.concatenate(read), ((0, pad), (0, 0))))[None]
        h_1MD = h_1MD.astype(self.cfg.model.dtype)
        read_1M2 = _read_tokens(self.params, h_1MD, jnp.asarray(np.pad(ids_M, (0, pad)))[None])
        ends = np.cumsum([len(after) for _, _, after in wanted])[:-1]
        for part in np.split(np.asarray(read_1M2, np.float64)[0, : len(ids_M)], ends):
            yield float(part[:, 0].sum()), bool(part[:, 1].all())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once.

        Where mechanisms act on every token, in windows of the model's length, as the harness does
        for Hugging Face models. Under "continuation" they act on prompts, so texts are scored in
        blocks, each with all before it, as far as there is room, as its prompt.
        """
        windows = [self._windows(self.tok_encode(request.args[0])) for request in requests]
        flat = [(None, *window) for found in windows for window in found]
        scored = iter(self._loglikelihood_tokens(flat, disable_tqdm) if flat else [])
        totals = [sum((next(scored)[0] for _ in found), 0.0) for found in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        if self.cfg.effective_protocol != "continuation":
            found = utils.get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length - 1, 1
            )
            return [utils.make_disjoint_window(window) for window in found]
        block, text = self.rolling_block, [self.prefix_token_id, *ids]
        room = self.max_length - block
        ends = range(1, len(text), block)
        return [(text[max(end - room, 0) : end], text[end : end + block]) for end in ends]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until a stop string, an end token or the token limit.

        Understood: until, max_gen_toks, do_sample, temperature, top_k, top_p, repetition_penalty.

        Raises:
          InputError: A request asks for something else, before anything is generated.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        settings = {key: self._settings(requests[i[0]].args[1]) for key, i in groups.items()}
        texts, number = [""] * len(requests), 0
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for key, members in groups.items():
                cfg, until = settings[key]
                rows = {i: self._context(requests[i].args[0], cfg) for i in members}
                order = sorted(members, key=lambda i: -len(rows[i]))
                for at in range(0, len(order), self.batch_size):
                    batch = order[at : at + self.batch_size]
                    seeded = cfg.replace(seed=(cfg.seed + number) % 2**32)
                    number += 1
                    made = self._continue([rows[i] for i in batch], seeded, until)
                    for index, text in zip(batch, made, strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return texts

    def _settings(self, asked: dict[str, Any]) -> tuple[Config, list[str]]:
        """What a request asks for: how to generate, and the strings that end it."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        until = [stop for stop in handle_stop_sequences(wanted.pop("until"), eos=None) if stop]
        length = wanted.pop("max_gen_toks")
        sampling = {name: wanted.pop(name) for name in _SAMPLING if name in wanted}
        other = {k: v for k, v in wanted.items() if k not in _NEUTRAL or v != _NEUTRAL[k]}
        if other:
            raise InputError(f"generation settings that qs-jax does not have: {other}.")
        if not 1 <= length < self.max_length:
            raise InputError(
                f"max_gen_toks must lie between 1 and {self.max_length - 1}, got {length}."
            )
        temperature = sampling.get("temperature", 1.0) if sampling["do_sample"] else 0.0
        top_k = sampling.get("top_k")
        added = self.tokenizer.get_added_vocab()
        stops = {*self.cfg.stop_ids, self.eot_token_id, *(added[s] for s in until if s in added)}
        cfg = self.cfg.replace(
            max_new_tokens=length,
            temperature=temperature,
            top_k=top_k if top_k and top_k > 0 else None,
            top_p=sampling.get("top_p"),
            repetition_penalty=sampling.get("repetition_penalty") or 1.0,
            seed=self.seed,
            eos_token_ids=tuple(sorted(stops)),
        )
        return cfg, until

    def _context(self, text: str, cfg: Config) -> list[int]:
        ids = self.tok_encode(text) or [self.prefix_token_id]
        room = self.max_length - cfg.max_new_tokens
        self.truncated += len(ids) > room
        return ids[-room:]

    def _continue(self, rows: list[list[int]], cfg: Config, until: list[str]) -> list[str]:
        """Texts of a batch; stops once every row has ended or met a stop string."""
        made: list[list[int]] = [[] for _ in rows]
        ended = [False] * len(rows)
        for step in stream(self.params, rows, cfg):
            for row, (token, new, done) in enumerate(
                zip(step.tokens.tolist(), step.is_new, step.done, strict=True)
            ):
                if ended[row]:
                    continue
                if new:
                    made[row].append(token)
                ended[row] = bool(done) or any(stop in self._text(made[row]) for stop in until)
            if all(ended):
                break
        return [postprocess_generated_text(self._text(ids), until, None) for ids in made]

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@jax.jit
def _read_tokens(params: Params, h_BTD: Array, ids_BT: Array) -> Array:
    """Log-probability of a token after each state, and 1 where it is the likeliest: `[B, T, 2]`."""

    def chunk(h_BCD: Array, ids_BC: Array) -> Array:
        logits_BCV = head.logits(params, h_BCD)
        own_BC = jnp.take_along_axis(logits_BCV, ids_BC[..., None], axis=-1)[..., 0]
        best_BC = jnp.argmax(logits_BCV, axis=-1) == ids_BC
        logprobs_BC = own_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
        return jnp.stack([logprobs_BC, best_BC.astype(logprobs_BC.dtype)], axis=-1)

    return head.map_positions(chunk, head.head_table(params).shape[0], h_BTD, ids_BT)
