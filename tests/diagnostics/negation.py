"""A hand-made model in which one token turns the answer round, in its second layer.

Every token but NOT carries 10 in channel 3, which says GOOD. Layer 1 does nothing. In layer 2 every
token asks for NOT, whose keys are marked in channel 1, and finds BOS, marked in channel 2, where it
sees no NOT; what it finds in channel 1 goes to channel 4, which says BAD. NOT itself gains in
channel 2. So every token after NOT says BAD, unless NOT halts after layer 1 and its keys of layer 2
are skipped.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qs_jax.config import HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.testing import tiny_model

BOS, NOT, GOOD, BAD, WORD = 2, 3, 5, 6, 7
TEXT = np.array([BOS, WORD, NOT, BAD, BAD, BAD, BAD])
AT = 2
ASK, SEES_NOT, SEES_BOS, WRITES, GAINS = 3.0, 5.0, 2.5, 8.0, 400.0
HEAD = 8  # and width of the model

MODEL = tiny_model(
    vocab_size=16,
    num_layers=2,
    hidden_size=HEAD,
    num_heads=1,
    num_kv_heads=1,
    head_dim=HEAD,
    mlp_size=HEAD,
    max_positions=32,
    norm_eps=1e-6,
    rope_theta=1e12,  # channel 3 of a head turns by 1e-9 a token: positions play no part
)
# Nobody halts but NOT, which is told to.
PRESET = QuickSilverConfig(
    halting=HaltingConfig(tau_drift=0.0, entropy=None, forced_ids=(NOT,), forced_layer=1),
    kv_skip=KVSkipConfig("skip"),
    sink_tokens=0,
)


def embeddings() -> np.ndarray:
    table = np.zeros((16, HEAD))
    table[:, 0] = table[:, 3] = 10
    table[BOS] = 0
    table[BOS, [0, 2]] = 50
    table[NOT] = 0
    table[NOT, [0, 1]] = 1, 3
    return table


def params() -> dict[str, Any]:
    answers = np.zeros((16, HEAD))
    answers[GOOD, 3] = answers[BAD, 4] = 4
    qkv, out = np.zeros((2, HEAD, 3 * HEAD)), np.zeros((2, HEAD, HEAD))
    gate_up, down = np.zeros((2, HEAD, 2 * HEAD)), np.zeros((2, HEAD, HEAD))
    query, key, value = 3, HEAD + 3, 2 * HEAD
    qkv[1, 0, query] = ASK
    qkv[1, 1, key], qkv[1, 2, key] = SEES_NOT, SEES_BOS
    qkv[1, 1, value] = 1
    out[1, 0, 4] = WRITES
    gate_up[1, 1, [0, HEAD]] = 1
    down[1, 0, 2] = GAINS
    norm = {"scale": np.ones((2, HEAD))}
    tree = {
        "embed": {"tokens": embeddings()},
        "layers": {
            "attn_norm": norm,
            "qkv": {"kernel": qkv},
            "out": {"kernel": out},
            "mlp_norm": norm,
            "gate_up": {"kernel": gate_up},
            "down": {"kernel": down},
        },
        "final_norm": {"norm": {"scale": np.ones(HEAD)}},
        "head": {"tokens": answers},
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def last_states(halted: bool) -> np.ndarray:
    """By hand: states of TEXT after layer 2."""
    h = embeddings()[TEXT]

    def normed(h: np.ndarray) -> np.ndarray:
        return h / np.sqrt((h * h).mean(-1, keepdims=True) + MODEL.norm_eps)

    x, after = normed(h), h.copy()
    for i in range(len(TEXT)):
        seen = [t for t in range(i + 1) if t == i or not (halted and t == AT)]
        logits = ASK * x[i, 0] * (SEES_NOT * x[seen, 1] + SEES_BOS * x[seen, 2]) / np.sqrt(HEAD)
        weights = np.exp(logits - logits.max())
        after[i, 4] += WRITES * (weights @ x[seen, 1]) / weights.sum()
    inner = normed(after)[:, 1]
    after[:, 2] += GAINS * inner / (1 + np.exp(-inner)) * inner
    if halted:
        after[AT] = h[AT]
    return after
