"""The table between Hugging Face tensors and our stacked tree, used in both directions.

One `Rule` is one Hugging Face tensor (of each layer): where it goes, whether it is transposed
(`nn.Linear` stores `[out, in]`, Flax kernels are `[in, out]`) and which columns of a fused kernel
it fills. `match` holds a source against the table before a byte is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from convert.errors import Problems
from qs_jax.config import ModelConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One Hugging Face tensor.

    Attributes:
      name: Its name, with `{layer}` where the layer index stands.
      target: Path of the parameter in our tree.
      shape: Its shape in the Hugging Face checkpoint.
      transpose: Swap its two axes.
      columns: Columns of the target's last axis it fills, start and end; None for all.
    """

    name: str
    target: tuple[str, ...]
    shape: Shape
    transpose: bool = False
    columns: tuple[int, int] | None = None

    @property
    def per_layer(self) -> bool:
        """Whether the tensor exists once a layer."""
        return self.target[0] == "layers"

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor as it stands in our tree (one layer, its own columns)."""
        return tensor.T if self.transpose else tensor

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        """Inverse of `to_flax`, given one layer of the whole (fused) parameter."""
        part = leaf if self.columns is None else leaf[..., slice(*self.columns)]
        return part.T if self.transpose else part


@dataclasses.dataclass(frozen=True)
class Table:
    """All rules of one architecture.

    Attributes:
      prefix: What Hugging Face may or may not put in front of every name.
      rules: One per tensor kind.
      ignored: Patterns of tensors that hold no weights (masks, frequencies).
    """

    prefix: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...]

    def full_name(self, name: str) -> str:
        """The name Hugging Face itself writes: with the prefix, but for the head."""
        return name if name.startswith("lm_head.") else self.prefix + name

    def names(self, rule: Rule, num_layers: int) -> list[str]:
        """The tensor names of a rule, one per layer, without the optional prefix."""
        layers = range(num_layers) if rule.per_layer else [0]
        return [rule.name.format(layer=layer) for layer in layers]


def table_of(model: ModelConfig) -> Table:
    """The table of `model`; rules for biases and heads it does not have are left out."""
    table = _gpt2(model) if model.model_type == "gpt2" else _llama(model)
    head = Rule("lm_head.weight", ("head", "tokens"), (model.vocab_size, model.hidden_size))
    return table if model.tie_embeddings else dataclasses.replace(table, rules=(*table.rules, head))


def _gpt2(m: ModelConfig) -> Table:
    d, f, layer = m.hidden_size, m.mlp_size, "h.{layer}."
    rules = [
        Rule("wte.weight", ("embed", "tokens"), (m.vocab_size, d)),
        Rule("wpe.weight", ("embed", "positions"), (m.max_positions, d)),
        *_norm(layer + "ln_1", ("layers", "attn_norm"), d),
        *_dense(layer + "attn.c_attn", ("layers", "qkv"), (d, 3 * d), bias=True),
        *_dense(layer + "attn.c_proj", ("layers", "out"), (d, d), bias=True),
        *_norm(layer + "ln_2", ("layers", "mlp_norm"), d),
        *_dense(layer + "mlp.c_fc", ("layers", "up"), (d, f), bias=True),
        *_dense(layer + "mlp.c_proj", ("layers", "down"), (f, d), bias=True),
        *_norm("ln_f", ("final_norm", "norm"), d),
    ]
    return Table("transformer.", tuple(rules), (r"h\.\d+\.attn\.(masked_)?bias",))


def _llama(m: ModelConfig) -> Table:
    d, q, kv, f = m.hidden_size, m.q_size, m.kv_size, m.mlp_size
    attn, mlp = "layers.{layer}.self_attn.", "layers.{layer}.mlp."
    qkv, gate_up = ("layers", "qkv"), ("layers", "gate_up")

    def linear(name: str, target: tuple[str, ...], shape: Shape, columns=None) -> list[Rule]:
        bias = m.mlp_bias if ".mlp." in name else m.attention_bias
        return _dense(name, target, shape, bias=bias, transpose=True, columns=columns)

    rules = [
        Rule("embed_tokens.weight", ("embed", "tokens"), (m.vocab_size, d)),
        *_norm("layers.{layer}.input_layernorm", ("layers", "attn_norm"), d, bias=False),
        *linear(attn + "q_proj", qkv, (q, d), (0, q)),
        *linear(attn + "k_proj", qkv, (kv, d), (q, q + kv)),
        *linear(attn + "v_proj", qkv, (kv, d), (q + kv, q + 2 * kv)),
        *linear(attn + "o_proj", ("layers", "out"), (d, q)),
        *_norm("layers.{layer}.post_attention_layernorm", ("layers", "mlp_norm"), d, bias=False),
        *linear(mlp + "gate_proj", gate_up, (f, d), (0, f)),
        *linear(mlp + "up_proj", gate_up, (f, d), (f, 2 * f)),
        *linear(mlp + "down_proj", ("layers", "down"), (d, f)),
        *_norm("norm", ("final_norm", "norm"), d, bias=False),
    ]
    return Table("model.", tuple(rules), (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",))


def _norm(name: str, target: tuple[str, ...], width: int, bias: bool = True) -> list[Rule]:
    rules = [Rule(name + ".weight", (*target, "scale"), (width,))]
    return rules + ([Rule(name + ".bias", (*target, "bias"), (width,))] if bias else [])


def _dense(
    name: str,
    target: tuple[str, ...],
    shape: Shape,
    *,
    bias: bool,
    transpose: bool = False,
    columns: tuple[int, int] | None = None,
) -> list[Rule]:
    out = shape[0] if transpose else shape[1]
    rules = [Rule(name + ".weight", (*target, "kernel"), shape, transpose, columns)]
    if bias:
        rules.append(Rule(name + ".bias", (*target, "bias"), (out,), columns=columns))
    return rules


def match(table: Table, shapes: Mapping[str, Shape], model: ModelConfig, problems: Problems):
    """Hold the tensors of a source against the table.

    Args:
      table: Rules of the architecture.
      shapes: Shape of every tensor in the source, by its name.
      model: Has the number of layers.
      problems: Receives tensors that are missing, ambiguous, misshapen or unmapped.

    Returns:
      dict from the table's tensor name to the source's tensor name.
    """
    found: dict[str, str] = {}
    unmapped = dict(shapes)
    for rule in table.rules:
        for name in table.names(rule, model.num_layers):
            spellings = dict.fromkeys([table.full_name(name), name])
            present = [spelling for spelling in spellings if spelling in shapes]
            for candidate in present:
                unmapped.pop(candidate)
            if not present:
                problems.add("missing tensors", f"{name} {list(rule.shape)}")
            elif len(present) > 1:
                problems.add("ambiguous tensors", " and ".join(present))
            elif tuple(shapes[present[0]]) != rule.shape:
                got = list(shapes[present[0]])
                problems.add(
                    "misshapen tensors", f"{present[0]}: {got}, expected {list(rule.shape)}"
                )
            else:
                found[name] = present[0]
    ignored = re.compile("|".join(f"(?:{re.escape(table.prefix)})?{p}" for p in table.ignored))
    for name in unmapped:
        if not ignored.fullmatch(name) and not is_tied_head(name, model):
            problems.add("unmapped tensors", f"{name} {list(shapes[name])}")
    return found


def is_tied_head(name: str, model: ModelConfig) -> bool:
    """Whether `name` is a stored copy of a head that the config ties to the embedding."""
    return model.tie_embeddings and name == "lm_head.weight"
