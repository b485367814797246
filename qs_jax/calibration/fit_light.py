"""Fit light layers, and the maps of where tokens stop, on the states that light layers make.

The stream of fitting tokens runs dense up to the first light layer. From there on each layer is
made light in turn: heads and neurons are chosen on a part of the text, the map is solved from sums
over all of it, and the stream goes on with what the light layer gives. States lie in files, so
memory does not grow with the text. Everything is least squares on frozen weights.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from qs_jax.accounting.flops import linear_flops
from qs_jax.calibration import choose, sensitivity
from qs_jax.calibration.choose import Moments
from qs_jax.calibration.sensitivity import (
    Metric,
    as_float64,
    dense_layer,
    layer_params,
    unrotated,
    watched_layer,
)
from qs_jax.config import ModelConfig
from qs_jax.engine import inputs
from qs_jax.engine.attention import blocked_attention
from qs_jax.engine.weights import check_params
from qs_jax.errors import ConfigError, InputError
from qs_jax.jax_settings import default_settings
from qs_jax.mechanisms.fusion import back
from qs_jax.mechanisms.kv_maps import KVMaps
from qs_jax.mechanisms.light import LightLayer, kept_mlp
from qs_jax.models import Params, apply_block, embed, family_of
from qs_jax.models.cpu import stored_params
from qs_jax.models.layers import PreNormBlock, normed, product, rms_normalised

CHOOSING = 10_000  # tokens on which heads and neurons are chosen
NEURON_STEP = 32  # sizes are multiples of these
CODE_STEP, MOST_CODE = 16, 640
RIDGE, RIDGE_CHOICE = 1e-3, 1e-2
PRICES = (0.0007, 0.0014)  # tried by default
NEXT_LAYERS = 5  # layers below a stop whose neurons its maps may read


@functools.partial(jax.jit, static_argnames="model")
def _contexts(params_l: Any, h_BTD: Array, pos_BT: Array, model: ModelConfig) -> Array:
    """What each head reads, heads side by side `[B, T, N H]`."""

    def read(block: PreNormBlock) -> Array:
        q, k, v = block.project(normed(block.attn_norm, h_BTD, model), pos_BT)
        context_BTNH = blocked_attention(q, k, v, window=model.sliding_window)
        return context_BTNH.reshape(*h_BTD.shape[:2], -1)

    return apply_block(model, params_l, method=read)


@functools.partial(jax.jit, static_argnames="model")
def _attended(params_l: Any, h_BTD: Array, context_BTQ: Array, kept_Q: Array, model: ModelConfig):
    """States after attention of the kept heads."""
    out = params_l["out"]
    context = (context_BTQ * kept_Q[None, None]).astype(out["kernel"].dtype)
    a_BTD = h_BTD + product(context, out["kernel"]).astype(h_BTD.dtype)
    return a_BTD + jnp.broadcast_to(out.get("bias", 0.0), a_BTD.shape)


@functools.partial(jax.jit, static_argnames="model")
def _neurons(params_l: Any, h_BTD: Array, model: ModelConfig) -> Array:
    return apply_block(model, params_l, h_BTD, method="mlp_neurons")


@functools.partial(jax.jit, static_argnames="model")
def _features(params_l: Any, h_BTD: Array, model: ModelConfig) -> Array:
    return apply_block(model, params_l, h_BTD, method="light_features")


@jax.jit
def _advance(h_BTD: Array, read_BTF: Array, code: tuple[Array, Array]) -> Array:
    return h_BTD + (read_BTF @ code[0]) @ code[1]


@functools.partial(jax.jit, static_argnames="dtype")
def _sums(x_BTF: Array, y_BTO: Array, weight_BT: Array, dtype: str) -> tuple[Array, Array]:
    """X'X and X'Y over weighted tokens."""
    root_N1 = jnp.sqrt(weight_BT).reshape(-1, 1)
    x, y = ((part.reshape(len(root_N1), -1) * root_N1).astype(dtype) for part in (x_BTF, y_BTO))
    return product(x.T, x), product(x.T, y)


def positions(array_BT: Any) -> Array:
    """The position of every token of whole rows."""
    return jnp.broadcast_to(jnp.arange(array_BT.shape[1])[None], array_BT.shape[:2])


@jax.jit
def _linear(h_BTD: Array) -> Array:
    return jnp.concatenate([rms_normalised(h_BTD), jnp.ones_like(h_BTD[..., :1])], axis=-1)


class FittingText:
    """Windows to fit on, and what one dense pass over them says.

    Attributes:
      metric: What later queries feel of each layer's keys and values.
      weight_WT: Weight of each token: the root of the attention that later queries paid it.

    Args:
      params: From `qs_jax.load`; products run in their dtype.
      tokens: int `[W, T]` windows; some tens of thousands of tokens.
      model: From `qs_jax.load`.
      firsts: Layers from which streams may begin, 2 to L - 1.
      skip_first: First positions of a window, which always run whole.
      batch_size: Windows at a time.
      data: Name of the text, for the provenance.
      progress: Show progress and time left.

    Raises:
      ConfigError: There is no such layer, or the sliding window is too short.
      InputError: Windows of several lengths, too short, or too few tokens.
    """

    @default_settings()
    def __init__(
        self,
        params: Params,
        tokens: inputs.TokensLike,
        model: ModelConfig,
        firsts: Sequence[int],
        *,
        skip_first: int = 4,
        batch_size: int = 8,
        data: str = "",
        progress: bool = False,
    ) -> None:
        check_params(params, model, floats=True)
        for first in firsts:
            if not 2 <= first < model.num_layers:
                last = model.num_layers - 1
                raise ConfigError(f"light layers begin at layer 2 to {last}, got {first}.")
        batch = inputs.make_batch(tokens, model)
        inputs.check_positions(batch.tokens_BT.shape[1], 0, model)
        self.tokens_WT = batch.tokens_BT
        width, needed = self.tokens_WT.shape[1], 2 * sensitivity.FAR
        if len(np.unique(batch.lengths_B)) > 1 or width < needed:
            raise InputError(
                f"light layers are fitted on windows of one length, {needed} tokens at least."
            )
        if (model.sliding_window or width) <= sensitivity.FAR:
            raise ConfigError(
                f"light layers are fitted on what tokens attend to {sensitivity.FAR} and more "
                f"before them: a sliding window of {model.sliding_window} leaves nothing."
            )
        if self.tokens_WT.size < 2 * model.hidden_size:
            raise InputError(
                f"{self.tokens_WT.size} tokens cannot determine maps of {model.hidden_size} rows "
                "and more: give more text to fit on."
            )
        self.params, self.dtype = stored_params(params), model.dtype
        self.model = model.replace(dtype="float32")
        self.skip_first, self.batch_size, self.progress = skip_first, batch_size, progress
        self.provenance = {"data": data, "tokens": int(self.tokens_WT.size), "width": width}
        self.provenance |= {"skip_first": skip_first, "weights": model.weights}
        self._folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, self._folder)
        self.states = {first: self.file(f"dense.{first}") for first in firsts}
        self._attended: dict[int, Array] = {}
        self._read_dense(min(firsts))

    def file(self, name: str) -> np.memmap:
        """States of all tokens, in a file that goes with this object."""
        path = Path(self._folder) / name
        shape = (*self.tokens_WT.shape, self.model.hidden_size)
        return np.memmap(path, np.float32, "w+", shape=shape)

    def batches(self, title: str, every: int = 1) -> Iterator[slice]:
        """Rows of each batch, or of one in so many."""
        starts = range(0, len(self.tokens_WT), self.batch_size * every)
        for start in tqdm(starts, title, disable=not self.progress, leave=False):
            yield slice(start, start + self.batch_size)

    def embedded(self, rows: slice) -> Array:
        """Input embeddings of some windows."""
        tokens_BT = jnp.asarray(self.tokens_WT[rows])
        return embed(self.params, tokens_BT, positions(tokens_BT), self.model)

    def _read_dense(self, first: int) -> None:
        model, skip, width = self.model, self.skip_first, self.tokens_WT.shape[1]
        layers = [layer_params(self.params, index) for index in range(model.num_layers)]
        felt: list[Any] = [None] * model.num_layers
        weight, self._asked_WT = (np.zeros(self.tokens_WT.shape) for _ in range(2))
        batches = 0
        for rows in self.batches("dense pass"):
            h_BTD = self.embedded(rows)
            for number, params_l in enumerate(layers, start=1):
                given = (params_l, h_BTD, positions(h_BTD), model)
                if number in self.states:
                    self.states[number][rows] = np.asarray(h_BTD)
                if number < first:
                    h_BTD = dense_layer(*given)
                    continue
                h_BTD, (received, asked), part = watched_layer(*given, skip)
                weight[rows] += np.asarray(received)
                self._asked_WT[rows] += np.asarray(asked)
                at, part = number - 1, as_float64(part)
                felt[at] = part if felt[at] is None else jax.tree.map(np.add, felt[at], part)
            batches += 1
        unread = jax.tree.map(np.zeros_like, felt[-1])
        felt = [unread if part is None else part for part in felt]
        asked = len(self.tokens_WT) * min(sensitivity.ASKING, width // 4)
        self.metric = Metric(self.params, felt, asked, batches, model)
        weight[:, width - sensitivity.FAR :] = np.nan  # too late to be read from afar
        weight = np.sqrt(np.clip(weight / np.nanmean(weight[:, skip:]), 1e-3, 1e3))
        weight = np.nan_to_num(weight, nan=1.0)
        weight[:, :skip] = 0
        self.weight_WT = (weight / weight[:, skip:].mean()).astype(np.float32)

    def add_up(
        self,
        title: str,
        read: Callable[[slice], Any],
        weight_WT: np.ndarray | None = None,
        dtype: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """X'X and X'Y over all tokens, in float64; `read` gives X and Y of some windows."""
        gram, cross = np.zeros(()), np.zeros(())
        weights = self.weight_WT if weight_WT is None else weight_WT
        for rows in self.batches(title):
            sums = _sums(*read(rows), jnp.asarray(weights[rows]), dtype or self.dtype)
            gram, cross = gram + as_float64(sums[0]), cross + as_float64(sums[1])
        return gram, cross

    def attended(self, first: int) -> Array:
        """Log of the attention that the last queries pay a token, linear in its state.

        That is the state before layer `first`; attention is squared and summed over heads and
        layers.
        """
        if first in self._attended:
            return self._attended[first]
        width = self.tokens_WT.shape[1]
        last = width - min(sensitivity.ASKING, width // 4) - sensitivity.FAR // 2
        counted_WT = np.zeros(self.tokens_WT.shape, np.float32)
        counted_WT[:, self.skip_first : last] = 1
        paid_WT = np.log(self._asked_WT + 1e-9)
        paid_WT -= paid_WT[:, self.skip_first : last].mean()

        def read(rows: slice) -> tuple[Array, Array]:
            paid_BT1 = jnp.asarray(paid_WT[rows, :, None], jnp.float32)
            return _linear(jnp.asarray(self.states[first][rows])), paid_BT1

        gram, cross = self.add_up("attention to come", read, counted_WT, "float32")
        scale = np.ones(len(gram))
        scale[-1] = 0
        solved, _ = choose.ridge(gram, cross, gram[-1, -1], RIDGE_CHOICE, scale)
        self._attended[first] = jnp.asarray(solved[:, 0], jnp.float32)
        return self._attended[first]


class Stream:
    """Fitting tokens on their way through light layers; a text carries one stream at a time.

    Attributes:
      layer: Layers that the tokens have run.
      light: The light ones among them.

    Args:
      text: What to fit on.
      first: First light layer, one of the text's `firsts`.
      price: Least gain, in units of `sensitivity`, that is worth the work of a whole layer.
    """

    def __init__(self, text: FittingText, first: int, price: float) -> None:
        self.text, self.first, self.price = text, first, price
        self.layer, self.light = first - 1, list[LightLayer]()
        self._reduced: Any = None  # MLP inputs of the last light layer
        self._dense, self._own = (text.file(f"{name}.now") for name in ("dense", "own"))
        for rows in text.batches(f"from layer {first}"):
            self._dense[rows] = self._own[rows] = text.states[first][rows]

    # --- the stream -----------------------------------------------------------------------------

    def _state(self, rows: slice) -> Array:
        """The stream's states after `layer`; the first positions are dense."""
        own_BTD = jnp.asarray(self._own[rows])
        if self.light:
            light = self.light[-1]
            read_BTF = _features(self._reduced, own_BTD, self.text.model)
            own_BTD = _advance(own_BTD, read_BTF, (light.encode_FR, light.decode_RD))
            own_BTD = own_BTD.at[:, : self.text.skip_first].set(
                self._dense[rows][:, : self.text.skip_first]
            )
        return own_BTD

    def _reduce_mlp(self, index: int, neurons_M: Any) -> Any:
        params_l = layer_params(self.text.params, index)
        return kept_mlp(params_l, jnp.asarray(neurons_M), self.text.model.mlp_size)

    @property
    def _every(self) -> int:
        return max(self.text.tokens_WT.size // CHOOSING, 1)

    def _per_layer(self, flops: int | float) -> float:
        """The price of so many operations a token."""
        return self.price * flops / linear_flops(self.text.model)

    def _tokens(self, array: Any) -> np.ndarray:
        """Rows of tokens, the first positions left out."""
        array = np.asarray(array)[:, self.text.skip_first :]
        return array.reshape(-1, array.shape[-1])

    def _own_parts(self, pairs: Iterator[tuple[Array, Array]]) -> np.ndarray:
        """Covariance of what of Z is not linear in the state, from (state, Z) of batches."""
        xx = xz = zz = tokens = 0.0
        for h_BTD, z_BTZ in pairs:
            x, z = self._tokens(_linear(h_BTD)), self._tokens(z_BTZ)
            xx, xz, zz, tokens = xx + x.T @ x, xz + x.T @ z, zz + z.T @ z, tokens + len(x)
        xx, xz, zz = (np.asarray(part, np.float64) for part in (xx, xz, zz))
        return choose.left_over(Moments(xx, xz, zz, tokens), RIDGE_CHOICE)

    def _choose_neurons(self, states: list[Array], metric: np.ndarray, params_l: Any) -> np.ndarray:
        """Neurons of a layer worth their price, computed on some states."""
        model = self.text.model
        found = self._own_parts((h, _neurons(params_l, h, model)) for h in states)
        reads = as_float64(params_l["down"]["kernel"]) @ metric
        inward = family_of(model).mlp_products - 1
        price = self._per_layer(2 * model.hidden_size * (inward + 0.3))
        chosen, _ = choose.neurons(found, reads, price, model.mlp_size)
        step = min(NEURON_STEP, max(model.mlp_size // 8, 1))
        count = choose.rounded(len(chosen), step, model.mlp_size)
        if count > len(chosen):  # rounded up, or none was worth it
            chosen, _ = choose.neurons(found, reads, -1.0, count)
        return np.sort(chosen[:count])

    @default_settings()
    def step(self) -> LightLayer:
        """Make the next layer light: choose its heads and neurons, fit its map, and run it."""
        model, number = self.text.model, self.layer + 1
        if number == model.num_layers:
            raise ConfigError(f"the last layer, {number}, cannot be light: stop before it.")
        params_l = layer_params(self.text.params, number - 1)
        some = [
            self._state(rows) for rows in self.text.batches(f"layer {number}, choice", self._every)
        ]
        contexts = [_contexts(params_l, h, positions(h), model) for h in some]
        found = self._own_parts(iter(zip(some, contexts, strict=True)))
        metric = self.text.metric.of_state(number)
        reads = as_float64(params_l["out"]["kernel"]) @ metric
        keys = self.text.tokens_WT.shape[1] / 2
        head = 4 * model.hidden_size * model.head_dim + 4 * model.head_dim * keys
        kept = choose.heads(found, reads, model.head_dim, self._per_layer(head))
        kept_Q = jnp.repeat(
            jnp.isin(jnp.arange(model.num_heads), jnp.asarray(kept)), model.head_dim
        )
        pairs = zip(some, contexts, strict=True)
        attended = [_attended(params_l, h, context, kept_Q, model) for h, context in pairs]
        neurons_M = self._choose_neurons(attended, metric, params_l)
        small = self._reduce_mlp(number - 1, neurons_M)

        def run(rows: slice) -> tuple[Array, Array]:
            h_BTD = self._state(rows)
            pos_BT = positions(h_BTD)
            context = _contexts(params_l, h_BTD, pos_BT, model)
            a_BTD = _attended(params_l, h_BTD, context, kept_Q, model)
            dense_BTD = dense_layer(params_l, jnp.asarray(self._dense[rows]), pos_BT, model)
            self._own[rows], self._dense[rows] = np.asarray(a_BTD), np.asarray(dense_BTD)
            return _features(small, a_BTD, model), dense_BTD - a_BTD

        gram, cross = self.text.add_up(f"layer {number}, map", run)
        encode, decode = self._solve(
            gram, cross, model.hidden_size, lambda m: m @ metric, model.hidden_size
        )
        self.light.append(LightLayer(jnp.asarray(kept), jnp.asarray(neurons_M), encode, decode))
        self.layer, self._reduced = number, small
        return self.light[-1]

    def _solve(self, gram, cross, plain: int, weigh: Any, outputs: int) -> tuple[Array, Array]:
        """The map through a code; the first `plain` features have a mean square of 1."""
        tokens = gram[-1, -1]
        scale = np.diag(gram) / tokens
        scale[:plain], scale[-1] = 1.0, 0.0
        solved, held = choose.ridge(gram, cross, tokens, RIDGE, scale)
        price = self._per_layer(2 * (len(gram) + outputs))
        most = min(len(gram), cross.shape[1], MOST_CODE)
        found = choose.code(held, solved, weigh(solved), tokens, price, most, CODE_STEP)
        encode, decode = (jnp.asarray(part, jnp.float32) for part in found)
        return encode, decode

    @default_settings()
    def stop(self) -> KVMaps:
        """Maps to the keys and values of all deeper layers, for tokens that stop here."""
        model, at = self.text.model, self.layer
        deeper = range(at + 1, model.num_layers + 1)
        following = deeper[:NEXT_LAYERS]
        layers = {number: layer_params(self.text.params, number - 1) for number in deeper}
        some = [self._state(rows) for rows in self.text.batches(f"stop {at}, choice", self._every)]
        felt = self.text.metric
        chosen = [self._choose_neurons(some, felt.of_state(n), layers[n]) for n in following]
        small = [
            self._reduce_mlp(number - 1, ids) for number, ids in zip(following, chosen, strict=True)
        ]

        def run(rows: slice) -> tuple[Array, Array]:
            h_BTD = self._state(rows)
            plain = (h_BTD, self.text.embedded(rows), back(h_BTD, 1))
            read = [*map(rms_normalised, plain), *(_neurons(part, h_BTD, model) for part in small)]
            read_BTF = jnp.concatenate([*read, jnp.ones_like(h_BTD[..., :1])], axis=-1)
            dense_BTD, targets = jnp.asarray(self._dense[rows]), []
            for number in deeper:
                targets.append(unrotated(layers[number], dense_BTD, model))
                if number < model.num_layers:
                    dense_BTD = dense_layer(layers[number], dense_BTD, positions(h_BTD), model)
            return read_BTF, jnp.concatenate(targets, axis=-1)

        def weigh(solved: np.ndarray) -> np.ndarray:
            parts = np.split(solved, len(deeper), axis=-1)
            pairs = zip(parts, deeper, strict=True)
            return np.concatenate([felt.weigh(*pair) for pair in pairs], axis=-1)

        gram, cross = self.text.add_up(f"stop {at}, maps", run)
        outputs = 2 * model.kv_size * len(deeper)
        encode, decode = self._solve(gram, cross, 3 * model.hidden_size, weigh, outputs)
        by_layer = jnp.split(decode, len(deeper), axis=1)
        shallow = [jnp.zeros_like(by_layer[0])] * at
        return KVMaps(
            maps_LXFO=jnp.stack([*shallow, *by_layer])[:, None],
            layers=(at,),
            features=("state", "embedding", "previous", "neurons"),
            provenance=json.dumps(self.text.provenance | {"ridge": RIDGE, "price": self.price}),
            encode_XFR=encode[None],
            neurons=tuple(jnp.asarray(ids) for ids in chosen),
            light=tuple(self.light),
            light_from=self.first if self.light else None,
            attended_F=self.text.attended(self.first) if self.light else None,
        )
