"""The tables between Hugging Face modules and our stacked tree, read in both directions.

A parameter of ours holds one Hugging Face module, or several side by side (`qkv`, `gate_up`). Which
tensors a model has (biases, a head) and their shapes follow from our tree, so that the tables are
names only. `match` holds a source against them before a weight is read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from convert.errors import Problems
from convert.sources import StoredTensor
from qs_jax.config import ModelConfig
from qs_jax.models import abstract_params, family_of

# Our module -> Hugging Face modules, with {} where the layer index stands.
_MODULES: dict[str, dict[str, list[str]]] = {
    "gpt2": {
        "embed.tokens": ["wte"],
        "embed.positions": ["wpe"],
        "layers.attn_norm": ["h.{}.ln_1"],
        "layers.qkv": ["h.{}.attn.c_attn"],
        "layers.out": ["h.{}.attn.c_proj"],
        "layers.mlp_norm": ["h.{}.ln_2"],
        "layers.up": ["h.{}.mlp.c_fc"],
        "layers.down": ["h.{}.mlp.c_proj"],
        "final_norm.norm": ["ln_f"],
        "head.tokens": ["lm_head"],
    },
    "llama": {
        "embed.tokens": ["embed_tokens"],
        "layers.attn_norm": ["layers.{}.input_layernorm"],
        "layers.qkv": [f"layers.{{}}.self_attn.{name}_proj" for name in "qkv"],
        "layers.out": ["layers.{}.self_attn.o_proj"],
        "layers.mlp_norm": ["layers.{}.post_attention_layernorm"],
        "layers.gate_up": ["layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"],
        "layers.down": ["layers.{}.mlp.down_proj"],
        "layers.q_norm": ["layers.{}.self_attn.q_norm"],
        "layers.k_norm": ["layers.{}.self_attn.k_norm"],
        "final_norm.norm": ["norm"],
        "head.tokens": ["lm_head"],
    },
}
# Optional beginning of every name but those of heads.
_PREFIX = {"gpt2": "transformer.", "llama": "model."}
CLASSIFIER = "score.weight"
# Tensors that hold no weights: masks and frequencies.
_IGNORED = {
    "gpt2": r"h\.\d+\.attn\.(masked_)?bias",
    "llama": r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
}
_DTYPES = ("float16", "bfloat16", "float32", "float64")


class Rule(NamedTuple):
    """One Hugging Face tensor, of each layer.

    Attributes:
      name: Its name without the prefix, with {} where the layer index stands.
      target: Path of the parameter in our tree.
      shape: Its shape in the Hugging Face checkpoint.
      transpose: Swap its two axes (`nn.Linear` is `[out, in]`, Flax kernels are `[in, out]`).
      columns: Those that it fills, in the target's last axis.
    """

    name: str
    target: tuple[str, ...]
    shape: tuple[int, ...]
    transpose: bool = False
    columns: slice = slice(None)

    @property
    def per_layer(self) -> bool:
        """Whether the tensor exists once a layer."""
        return self.target[0] == "layers"

    def names(self, num_layers: int) -> list[str]:
        """The tensor names, one per layer, without the prefix."""
        return [self.name.format(layer) for layer in range(num_layers if self.per_layer else 1)]

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor in the layout of our tree: one layer, the columns it fills."""
        return tensor.T if self.transpose else tensor

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        """Inverse of `to_flax`, from one layer of the whole parameter."""
        return self.to_flax(leaf[..., self.columns])


def rules_of(model: ModelConfig, classes: int = 0) -> list[Rule]:
    """One rule for each tensor, in the order of their columns; a classifier has one more."""
    table, up = _MODULES[names_of(model)], model.mlp_size
    widths = {"qkv": (model.q_size, model.kv_size, model.kv_size), "gate_up": (up, up)}
    rules = [Rule(CLASSIFIER, ("classifier",), (classes, model.hidden_size))] if classes else []
    leaves: dict[Any, Any] = flatten_dict(abstract_params(model))
    for target, leaf in leaves.items():
        modules = table.get(".".join(target)) or table[".".join(target[:-1])]
        *rows, columns = leaf.shape[1:] if target[0] == "layers" else leaf.shape
        ends = list(itertools.accumulate(widths[target[1]])) if len(modules) > 1 else [columns]
        transpose = names_of(model) == "llama" and target[-1] == "kernel"
        kind = "bias" if target[-1] == "bias" else "weight"
        for module, start, end in zip(modules, [0, *ends], ends, strict=False):
            shape = (end - start, *rows) if transpose else (*rows, end - start)
            rules.append(Rule(f"{module}.{kind}", target, shape, transpose, slice(start, end)))
    return rules


def names_of(model: ModelConfig) -> str:
    """The family whose names a model's tensors have: "gpt2", or "llama" for all that rotate."""
    return "llama" if family_of(model).rotates else "gpt2"


def full_name(name: str, model: ModelConfig) -> str:
    """The name that Hugging Face itself writes."""
    is_head = name == CLASSIFIER or name.startswith("lm_head.")
    return name if is_head else _PREFIX[names_of(model)] + name


def match(
    rules: Iterable[Rule],
    tensors: Mapping[str, StoredTensor],
    model: ModelConfig,
    problems: Problems,
) -> dict[str, str]:
    """Names of a source's tensors, by those without the prefix; whatever fits no rule is noted."""
    matched: dict[str, str] = {}
    unmapped = set(tensors)
    for rule in rules:
        for name in rule.names(model.num_layers):
            spellings = dict.fromkeys([full_name(name, model), name])
            present = [spelling for spelling in spellings if spelling in tensors]
            if not present and rule.target == ("embed", "tokens"):  # stored under its other name
                present = [head for head in tensors if is_tied_head(head, model)]
            unmapped -= set(present)
            if not present:
                problems.add("missing tensors", f"{name} {list(rule.shape)}")
                continue
            if len(present) > 1:
                problems.add("ambiguous tensors", " and ".join(present))
            matched[name] = first = present[0]
            shape, dtype, *_ = tensors[first]
            if shape != rule.shape:
                expected = f"{list(shape)}, expected {list(rule.shape)}"
                problems.add("misshapen tensors", f"{first}: {expected}")
            if dtype not in _DTYPES:
                problems.add("tensor dtypes", f"{first}: {dtype} is not implemented")
    prefix, ignored = re.escape(_PREFIX[names_of(model)]), _IGNORED[names_of(model)]
    for name in sorted(unmapped):
        if not re.fullmatch(f"({prefix})?{ignored}", name) and not is_tied_head(name, model):
            hint = ": a classifier's head, which --classifier converts" * (name == CLASSIFIER)
            problems.add("unmapped tensors", f"{name} {list(tensors[name].shape)}{hint}")
    return matched


def is_tied_head(name: str, model: ModelConfig) -> bool:
    """Whether `name` is a stored copy of a head that the config ties to the embedding."""
    return model.tie_embeddings and name == "lm_head.weight"
