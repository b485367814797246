"""Fit the extrapolation maps: ridge least squares in closed form, nothing trained by gradient."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from qs_jax.calibration.families import check_layers
from qs_jax.config import ModelConfig
from qs_jax.config.fields import Above0, Count, Integers, Positive, parse
from qs_jax.engine import dense, inputs
from qs_jax.engine.weights import check_params
from qs_jax.errors import ConfigError, InputError
from qs_jax.jax_settings import default_settings
from qs_jax.mechanisms import kv_maps
from qs_jax.mechanisms.kv_maps import FEATURES, KVMaps, feature_count
from qs_jax.models import Params, family_of
from qs_jax.models.cpu import from_storage, stored_params
from qs_jax.state import exact_dtype


@default_settings()
def fit_kv_maps(
    params: Params,
    tokens: inputs.TokensLike,
    layers: Any,
    model: ModelConfig,
    *,
    features: Sequence[str] = ("state",),
    rank: int | None = None,
    ridge: float = 1e-3,
    skip_first: int = 4,
    batch_size: int = 16,
    data: str = "",
    progress: bool = False,
) -> KVMaps:
    """Fit, for each halting layer, one linear map to each deeper layer's keys and values.

    One dense pass over the tokens accumulates the Gram matrices X'X and X'Y of each pair of layers
    in float64; the maps solve (X'X + ridge n I) M = X'Y. With a `rank`, the maps of all layers
    deeper than a halting layer share one code (reduced-rank regression, Izenman 1975).

    Args:
      params: From `qs_jax.load`.
      tokens: int `[N, T]` windows, or rows of different lengths; some tens of thousands of tokens.
      layers: Halting layers, 1 to L - 1.
      model: From `qs_jax.load`.
      features: "state" and any of "embedding", "previous" and "neurons" (`KVMaps.features`).
      rank: Numbers of the code; None maps from the features themselves.
      ridge: Relative to the features' mean square, which is 1.
      skip_first: Positions left out at the start of each row: attention sinks are not typical.
      batch_size: Rows at a time.
      data: Name of the data, for the provenance.
      progress: Show a progress bar.

    Returns:
      Maps to put into `params["kv_maps"]`, or to save beside the checkpoint.

    Raises:
      ConfigError: Layers or features that do not exist.
      InputError: Too few tokens to determine the maps.
    """
    check_fit(layers, features, rank, model)
    options: dict[str, Any] = {"skip_first": skip_first, "data": data, "progress": progress}
    options |= {"features": features, "batch_size": batch_size}
    return accumulate(params, tokens, layers, model, **options).solve(rank=rank, ridge=ridge)


def check_fit(
    layers: Any, features: Sequence[str], rank: int | None, model: ModelConfig
) -> tuple[int, ...]:
    """Refuse maps that cannot be fitted, before anything is computed; returns rising layers."""
    unknown = [name for name in features if name not in FEATURES]
    if unknown or "state" not in features or len(set(features)) < len(features):
        raise ConfigError(f"features must hold 'state' and be among {FEATURES}, got {features}.")
    _check_rank(rank, feature_count(features, model))
    return check_layers(parse("layers", layers, Integers), model)


def _check_rank(rank: int | None, size: int) -> None:
    if rank is not None and parse("rank", rank, Positive) >= size:
        raise ConfigError(f"rank must be below the {size} numbers that the features are.")


class Moments(NamedTuple):
    """What the maps are solved from; features may be left out without another pass."""

    gram_XFF: np.ndarray  # X'X of each halting layer, float64
    cross_LXFO: np.ndarray  # X'Y of each deeper layer
    layers: tuple[int, ...]
    features: tuple[str, ...]  # in the order of F, a constant 1 after them
    model: ModelConfig
    provenance: dict[str, Any]

    def solve(self, *, rank: int | None = None, ridge: float = 1e-3) -> KVMaps:
        """The maps; arguments as of `fit_kv_maps`."""
        size, tokens = feature_count(self.features, self.model), self.provenance["tokens"]
        _check_rank(rank, size)
        parse("ridge", ridge, Above0)
        if tokens < size:
            raise InputError(f"{tokens} tokens cannot determine maps of {size} rows: give more.")
        penalty = np.eye(size) * ridge * tokens
        penalty[-1, -1] = 0  # the constant is free
        maps, encoders = [], []
        for x, layer in enumerate(self.layers):
            gram_FF = self.gram_XFF[x] + penalty
            cross_FDO = np.moveaxis(self.cross_LXFO[layer:, x], 0, 1)
            solved = np.linalg.solve(gram_FF, cross_FDO.reshape(size, -1))
            maps_DFO = np.moveaxis(solved.reshape(cross_FDO.shape), 0, 1)
            if rank is not None:
                code, maps_DFO = _reduced(gram_FF, maps_DFO, rank, tokens)
                encoders.append(code)
            shallow = np.zeros((layer, *maps_DFO.shape[1:]))
            maps.append(np.concatenate([shallow, maps_DFO]))
        return KVMaps(
            maps_LXFO=jnp.asarray(np.stack(maps, axis=1), jnp.float32),
            encode_XFR=jnp.asarray(np.stack(encoders), jnp.float32) if encoders else None,
            layers=self.layers,
            features=self.features,
            provenance=json.dumps(self.provenance | {"ridge": ridge}),
            neurons=(jnp.arange(self.model.mlp_size),) if "neurons" in self.features else (),
        )


def accumulate(
    params: Params,
    tokens: inputs.TokensLike,
    layers: Any,
    model: ModelConfig,
    *,
    features: Sequence[str] = ("state",),
    skip_first: int = 4,
    batch_size: int = 16,
    data: str = "",
    progress: bool = False,
) -> Moments:
    """The dense pass of `fit_kv_maps`, whose arguments these are."""
    check_params(params, model, floats=True)
    chosen = check_fit(layers, features, None, model)
    skip_first = parse("skip_first", skip_first, Count)
    batch_size = parse("batch_size", batch_size, Positive)
    batch = inputs.make_batch(tokens, model)
    inputs.check_positions(batch.tokens_BT.shape[1], 0, model)
    sums: list[np.ndarray] = []
    held = stored_params(params)
    program = jax.jit(_moments, static_argnames=("model", "chosen", "features"))
    for start in tqdm(range(0, len(batch.tokens_BT), batch_size), "fitting", disable=not progress):
        rows = slice(start, start + batch_size)
        tokens_BT, lengths_B = batch.tokens_BT[rows], batch.lengths_B[rows]
        pos_BT = np.arange(tokens_BT.shape[1])[None]
        counted_BT = (pos_BT >= skip_first) & (pos_BT < lengths_B[:, None])
        moments = program(
            held, tokens_BT, counted_BT, model=model, chosen=chosen, features=tuple(features)
        )
        sums = sums or [np.zeros(part.shape, np.float64) for part in moments]
        for total, part in zip(sums, moments, strict=True):
            np.add(total, np.asarray(part), out=total)
    assert sums
    provenance = {"data": data, "tokens": int(np.maximum(batch.lengths_B - skip_first, 0).sum())}
    provenance |= {"rows": len(batch.tokens_BT), "skip_first": skip_first, "weights": model.weights}
    return Moments(sums[0], sums[1], chosen, tuple(features), model, provenance)


def _reduced(
    gram_FF: np.ndarray, maps_DFO: np.ndarray, rank: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The code `[F, R]` and the maps from it `[D, R, O]` that lose least of the full maps.

    Keys and values of a layer count alike, whatever their scale: their errors are measured in
    units of what the full maps explain of them beyond the mean.
    """
    root_FF = np.linalg.cholesky(gram_FF).T  # gram = root' root
    fitted_DFO = root_FF @ maps_DFO
    deeper, size, columns = fitted_DFO.shape
    mean_DO = (gram_FF[-1] @ maps_DFO) / tokens
    energy_DO = np.square(fitted_DFO).sum(1) / tokens - np.square(mean_DO)
    halves_D2 = energy_DO.reshape(deeper, 2, columns // 2).sum(-1)
    scale_DO = np.repeat(1 / np.sqrt(np.maximum(halves_D2, 1e-12)), columns // 2, axis=1)
    flat_FP = np.moveaxis(fitted_DFO * scale_DO[:, None, :], 0, 1).reshape(size, -1)
    basis_FR = np.linalg.eigh(flat_FP @ flat_FP.T)[1][:, ::-1][:, :rank]
    return np.linalg.solve(root_FF, basis_FR), basis_FR.T @ fitted_DFO


def _moments(params: Params, tokens_BT, counted_BT, model: ModelConfig, chosen, features):
    """X'X `[X, F, F]` and X'Y `[L, X, F, O]` of one batch; Y before RoPE."""
    family, batch = family_of(model), tokens_BT.shape
    block = family.block(model)
    pos_BT = jnp.broadcast_to(jnp.arange(batch[1])[None], batch)
    embedded: Any = family.embed(model).apply({"params": params["embed"]}, tokens_BT, pos_BT)
    boundary_X = jnp.asarray(chosen)
    dtype = jnp.dtype(model.dtype)
    used_BT1 = counted_BT[..., None].astype(dtype)
    exact = exact_dtype(dtype)
    summed = functools.partial(jnp.einsum, preferred_element_type=exact)

    def read(block, h_BTD):
        sources = {
            "state": lambda: h_BTD,
            "embedding": lambda: embedded,
            "previous": lambda: jnp.pad(h_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1],
            "neurons": lambda: block.mlp_neurons(h_BTD),
        }
        return kv_maps.features(sources, features, dtype) * used_BT1

    def layer(carry, scanned):
        h_BTD, read_XBTF = carry
        number, params_l = scanned[0], from_storage(scanned[1])
        # The state at the start of this layer is the one a token stops with after the last.
        here_X = number == boundary_X + 1

        def stops():
            read_BTF: Any = block.apply({"params": params_l}, h_BTD, method=read)
            return jnp.where(here_X[:, None, None, None], read_BTF[None], read_XBTF)

        read_XBTF = lax.cond(here_X.any(), stops, lambda: read_XBTF)
        target: Any = block.apply({"params": params_l}, h_BTD, method="unrotated")
        cross = []
        for index, boundary in enumerate(chosen):
            zeros = jnp.zeros((size, target.shape[-1]), exact)

            def product(index=index):
                return summed("btf,bto->fo", read_XBTF[index], target)

            cross.append(lax.cond(number > boundary, product, lambda zeros=zeros: zeros))
        out: Any = block.apply({"params": params_l}, h_BTD, pos_BT, dense.attend_causal(model))
        return (out[0], read_XBTF), jnp.stack(cross)

    size = feature_count(features, model)
    empty = jnp.zeros((len(chosen), *batch, size), dtype)
    numbers = jnp.arange(1, model.num_layers + 1)
    (_, read_XBTF), cross = lax.scan(layer, (embedded, empty), (numbers, params["layers"]))
    return summed("xbtf,xbtg->xfg", read_XBTF, read_XBTF), cross
