"""One row of tokens on its way through the model and the mechanisms, for the oracle.

Each method is one sentence of docs/concepts.md or docs/mechanisms, for one token at one layer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qs_jax.config import Config, QuickSilverConfig
from tests.oracle.model import (
    TINY,
    OracleModel,
    cosine,
    entropy,
    fake_quant,
    int8_quant,
    rms,
    softmax,
)

NEVER = 2**30  # stands for "by nobody" where positions stand for absorbers


class Judge:
    """Compares, and remembers the closest call."""

    def __init__(self) -> None:
        self.margin = math.inf

    def below(self, signal: float, threshold: float) -> bool:
        if math.isfinite(threshold):
            self.note(abs(signal - threshold))
        return bool(signal < threshold)

    def above(self, signal: float, threshold: float) -> bool:
        return self.below(-signal, -threshold)

    def note(self, gap: float) -> None:
        self.margin = min(self.margin, float(gap))


def at(threshold: float | tuple[float, ...], layer: int) -> float:
    """One layer's entry of a threshold."""
    return threshold[layer - 1] if isinstance(threshold, tuple) else threshold


class Row:
    """One row on its way through the model. Layer axes have L + 1 entries; entry 0 is the input."""

    def __init__(
        self, net: OracleModel, maps: Any, cfg: Config, judge: Judge, tokens: list[int], prompt: int
    ) -> None:
        m, qs = cfg.model, cfg.quicksilver or QuickSilverConfig()
        depth, count = m.num_layers, len(tokens)
        self.net, self.maps, self.model, self.qs, self.judge = net, maps, m, qs, judge
        self.tokens, self.prompt, self.depth, self.count = tokens, prompt, depth, count
        self.online = cfg.effective_protocol != "continuation"
        special = {m.bos_token_id, m.pad_token_id, *m.eos_token_ids} if qs.protect_special else ()
        recent = qs.recent_tokens
        for length, more in qs.recent_tokens_over:
            recent = more if prompt > length else recent
        self.touched = [self.online or t < prompt - max(recent, 1) for t in range(count)]
        self.full = [
            token in qs.protect_ids or token in special or t < qs.sink_tokens
            for t, token in enumerate(tokens)
        ]
        self.retained = [qs.kv_skip is not None and x in qs.kv_skip.retain_ids for x in tokens]
        self.forced = [NEVER] * count
        if qs.halting and qs.halting.forced_layer is not None:
            ids, layer = qs.halting.forced_ids, qs.halting.forced_layer
            self.forced = [layer if token in ids else NEVER for token in tokens]

        heads, kv, width = m.num_heads, m.num_kv_heads, m.head_dim
        self.state = np.zeros((depth + 1, count, m.hidden_size))  # at the end of a layer
        self.after_block = np.zeros_like(self.state)  # before fusion
        self.merged = np.zeros_like(self.state)  # after fusion, before quantisation
        self.q = np.zeros((depth + 1, count, heads, width))
        self.k, self.v = np.zeros((2, depth + 1, count, kv, width))
        self.weight = np.zeros((depth + 1, count, heads, count))  # of a query's heads on keys
        self.seen = np.zeros((depth + 1, count, count), bool)  # key seen by query: [l, query, key]
        self.ran = np.zeros((depth + 1, count), bool)
        self.halt = np.full(count, depth)
        self.absorber = np.full((depth + 1, count), NEVER)
        self.weighed = np.zeros((depth + 1, count), bool)
        self.size, self.mass = np.ones((2, depth + 1, count))
        # One int8 product has one width: who is left alone still gets no more than 8 bits.
        self.bits = np.full(count, 8 if qs.amq is not None and qs.amq.execution != "fake" else 16)
        self.drift, self.entropy = np.full((2, depth + 1, count), np.nan)
        self.shortlist: dict[int, np.ndarray] = {}
        self.logits = np.zeros((count, m.vocab_size))
        for t, token in enumerate(tokens):
            self.state[0, t] = net.embed(token, t)

    def override(self, t: int, full: int, forced: int, retained: int) -> None:
        """What the caller wants of one token; 0 is nothing."""
        self.full[t] = self.full[t] or bool(full)
        self.forced[t] = min(self.forced[t], forced or NEVER)
        self.retained[t] = self.retained[t] or bool(retained)

    # Who is who.

    def absorbed(self, t: int, layer: int, by: int) -> bool:
        """Was t absorbed before this layer, as far as position `by` may know?"""
        return bool((self.absorber[1:layer, t] <= (by if self.online else NEVER - 1)).any())

    def stopped(self, t: int, layer: int) -> bool:
        return not self.online and self.absorbed(t, layer, t)

    def eligible(self, t: int, layer: int) -> bool:
        return self.touched[t] and not self.full[t] and not self.stopped(t, layer)

    def kept(self, t: int, layer: int) -> bool:
        """Does t have keys at this layer, whoever asks?"""
        skip = self.qs.kv_skip
        if skip is None or skip.policy in ("propagate", "extrapolate") or self.retained[t]:
            return True
        return bool(layer <= self.halt[t] + skip.delay)

    def sees(self, i: int, t: int, layer: int) -> bool:
        if i == t:
            return True
        if self.model.sliding_window is not None and i - t >= self.model.sliding_window:
            return False
        if self.absorbed(t, layer, by=i):
            return False
        if self.kept(t, layer):
            return True
        skip = self.qs.kv_skip
        if skip is None or skip.tau_kv is None:  # every policy but "attended"
            return False
        last = self.halt[t] + skip.delay
        queries = [u for u in range(t + 1, i + 1) if self.ran[last, u]]
        received = max((self.weight[last, u, :, t].max() for u in queries), default=0.0)
        return self.judge.above(received, skip.tau_kv)

    def bits_at(self, t: int, layer: int) -> int:
        if self.qs.amq is None or layer <= self.qs.amq.layer:
            return 16
        return int(self.bits[t])

    def quantised(self, target: str, x: np.ndarray, bits: int) -> np.ndarray:
        amq = self.qs.amq
        if amq is None or target not in amq.targets:
            return x
        if amq.execution != "fake":
            out, edge = int8_quant(x, bits, amq.group, rotate=target != "kv")
        else:
            out, edge = fake_quant(x, bits, amq.group, amq.symmetric, amq.rotate)
        self.judge.note(edge)
        return out

    # 1. Block.

    def block(self, t: int, layer: int) -> None:
        net, m, bits = self.net, self.model, self.bits_at(t, layer)
        h = self.state[layer - 1, t]
        q, kv = net.qkv(layer, self.quantised("linear", net.norm("attn_norm", layer, h), bits))
        skip, late = self.qs.kv_skip, self.halt[t] < layer
        if skip is not None and skip.policy == "extrapolate" and late:
            kv = self.extrapolated(t, layer)
        k, v = kv.reshape(2, m.num_kv_heads, m.head_dim)
        self.q[layer, t] = net.rotate(q, t)
        self.k[layer, t] = self.quantised("kv", net.rotate(k, t), bits)
        self.v[layer, t] = self.quantised("kv", v, bits)

        frozen = late and self.qs.halting is not None and self.qs.halting.freeze
        self.ran[layer, t] = not frozen and not self.stopped(t, layer)
        light = self.light_layer(t, layer)
        if self.ran[layer, t] and light is not None:
            h = self.lightly(t, layer, light)
        elif self.ran[layer, t]:
            context = self.attend(t, layer)
            h = h + net.linear("out", layer, self.quantised("linear", context, bits))
            x = self.quantised("linear", net.norm("mlp_norm", layer, h), bits)
            inner = self.quantised("linear", net.mlp_inner(layer, x), bits)
            h = h + net.linear("down", layer, inner)
        self.after_block[layer, t] = h

    def attend(self, t: int, layer: int) -> np.ndarray:
        m, fusion = self.model, self.qs.fusion
        keys = [s for s in range(t + 1) if self.sees(t, s, layer)]
        self.seen[layer, t, keys] = True
        context = np.zeros((m.num_heads, m.head_dim))
        for n in range(m.num_heads):
            kv_head = n // (m.num_heads // m.num_kv_heads)
            logits = self.k[layer, keys, kv_head] @ self.q[layer, t, n] / math.sqrt(m.head_dim)
            if fusion is not None and fusion.proportional_attention:
                logits = logits + np.log(self.size[layer - 1, keys])
            self.weight[layer, t, n, keys] = softmax(logits)
            context[n] = self.weight[layer, t, n, keys] @ self.v[layer, keys, kv_head]
        return context.reshape(-1)

    def light_layer(self, t: int, layer: int) -> Any:
        """The light layer that t runs in this one's place, if any."""
        first = self.qs.halting.light_from if self.qs.halting else None
        if first is None or not first <= layer < first + len(self.maps.light):
            return None
        return self.maps.light[layer - first] if self.eligible(t, layer) else None

    def lightly(self, t: int, layer: int, light: Any) -> np.ndarray:
        """Attention of the kept heads; then one map of the state, the kept neurons and 1."""
        net, width = self.net, self.model.head_dim
        out = {name: leaf[layer - 1] for name, leaf in net.layers["out"].items()}
        context = self.attend(t, layer).reshape(-1, width)
        a = self.state[layer - 1, t] + out.get("bias", 0.0)
        for n in light.heads_N.tolist():
            a = a + context[n] @ out["kernel"][width * n : width * (n + 1)]
        inner = net.mlp_inner(layer, net.norm("mlp_norm", layer, a))
        encode = np.asarray(light.encode_FR).astype(np.float64)
        code = a / rms(a) @ encode[: len(a)] + encode[-1]
        for neuron, row in zip(light.neurons_M.tolist(), encode[len(a) : -1], strict=True):
            code = code + inner[neuron] * row
        return a + code @ np.asarray(light.decode_RD).astype(np.float64)

    def extrapolated(self, t: int, layer: int) -> np.ndarray:
        at = int(self.halt[t])
        states = {"state": self.state[at, t], "embedding": self.state[0, t]}
        states["previous"] = self.state[at, t - 1] if t else np.zeros_like(self.state[0, 0])
        source = {name: x / max(rms(x), 1e-6) for name, x in states.items()}
        source["neurons"] = np.array(
            [
                self.net.mlp_inner(below, self.net.norm("mlp_norm", below, self.state[at, t]))[n]
                for below, ids in enumerate(self.maps.neurons, start=at + 1)
                for n in ids.tolist()
            ]
        )
        parts = [source[name] for name in self.maps.features]
        index = self.maps.layers.index(int(self.halt[t]))
        table = np.asarray(self.maps.maps_LXFO).astype(np.float64)[layer - 1, index]
        read = np.concatenate([*parts, [1.0]])
        if self.maps.encode_XFR is not None:
            read = read @ np.asarray(self.maps.encode_XFR).astype(np.float64)[index]
        return read @ table

    # 2. Signals.

    def drifted(self, t: int, layer: int, kind: str) -> float:
        after, before = self.after_block[layer, t], self.state[layer - 1, t]
        if kind == "cosine":
            return 1 - cosine(after, before)
        step = float(np.linalg.norm(after - before))
        return step if kind == "raw" else step / max(float(np.linalg.norm(after)), TINY)

    def uncertainty(self, kind: str, h: np.ndarray, t: int) -> float:
        if kind == "vocab":
            return entropy(self.net.logits(h))
        if kind == "shortlist":
            return entropy(self.net.logits(h)[self.shortlist[t]])
        if kind == "latent":
            return entropy(h / max(rms(h), TINY))
        if kind == "variance":
            return math.log(max(h.var(), TINY))
        return math.inf if t == 0 else entropy(self.logits[t - 1])  # final_prev

    def pick_shortlist(self, t: int, layer: int) -> None:
        if "shortlist" in self.qs.entropies and layer == self.qs.shortlist_layer:
            logits, size = self.net.logits(self.after_block[layer, t]), self.qs.shortlist_size
            order = np.argsort(-logits)
            self.shortlist[t] = order[:size]
            if size < len(order):
                self.judge.note(float(logits[order[size - 1]] - logits[order[size]]))

    # 3. Halting.

    def may_halt(self, layer: int) -> bool:
        halting = self.qs.halting
        if halting is None:
            return False
        first, last = halting.window or (1, self.depth - 1)
        inside = max(first, halting.min_layer) <= layer <= last
        return inside and (halting.layers is None or layer in halting.layers)

    def wants_to_halt(self, t: int, layer: int) -> bool:
        halting, judge = self.qs.halting, self.judge
        assert halting is not None
        self.drift[layer, t] = self.drifted(t, layer, halting.drift)
        if not judge.below(self.drift[layer, t], at(halting.tau_drift, layer)):
            return False
        if halting.entropy is None:
            return True
        h = self.after_block[layer, t]
        self.entropy[layer, t] = self.uncertainty(halting.entropy, h, t)
        return judge.below(self.entropy[layer, t], at(halting.tau_halt, layer))

    def lowest_scores(self, layer: int) -> list[int]:
        """The quota rule: who has to stop now, so that the share has stopped."""
        halting = self.qs.halting
        assert halting is not None
        assert halting.layers is not None
        everyone = [t for t in range(self.count) if self.eligible(t, layer)]
        running = [t for t in everyone if self.halt[t] >= layer]
        share = halting.quota[halting.layers.index(layer)]
        missing = math.floor(share * len(everyone) + 1e-3) - (len(everyone) - len(running))
        score = {t: self.score(t, layer) for t in running}
        order = sorted(running, key=lambda t: (score[t], t))
        if 0 < missing < len(order):
            gap = score[order[missing]] - score[order[missing - 1]]
            # A score nobody gave, and a random number, are equal in every implementation.
            if halting.score != "random" and score[order[missing]] != 0:
                self.judge.note(gap)
        return order[: max(missing, 0)]

    def leave_whole(self) -> None:
        """Who will be attended most runs all layers whole, by the maps; forced halts come first."""
        halting, attended = self.qs.halting, np.asarray(self.maps.attended_F).astype(np.float64)
        layer = halting.light_from - 1
        everyone = [t for t in range(self.count) if self.eligible(t, layer)]
        states = {t: self.state[layer, t] for t in everyone}
        score = {t: h / max(rms(h), 1e-6) @ attended[:-1] + attended[-1] for t, h in states.items()}
        order = sorted(everyone, key=lambda t: (score[t], t))
        count = math.floor(halting.light_share * len(everyone) + 1e-3)
        if 0 < count < len(order):
            self.judge.note(score[order[count]] - score[order[count - 1]])
        for t in order[count:]:
            self.full[t] = self.full[t] or self.forced[t] == NEVER

    def score(self, t: int, layer: int) -> float:
        halting = self.qs.halting
        assert halting is not None
        if halting.score == "random":
            import jax

            key = jax.random.fold_in(jax.random.key(halting.seed), t)
            return float(jax.random.uniform(key, dtype=np.float32))
        if halting.score == "drift":
            return self.drifted(t, layer, halting.drift)
        if halting.score == "entropy":
            assert halting.entropy is not None
            return self.uncertainty(halting.entropy, self.after_block[layer, t], t)
        first = max(t + 1, self.prompt - halting.score_queries)
        queries = [i for i in range(first, self.prompt) if self.seen[layer, i, t]]
        return max((float(self.weight[layer, i, :, t].max()) for i in queries), default=0.0)

    def maybe_halt(self, t: int, layer: int, chosen: list[int]) -> None:
        if self.qs.halting is None or self.halt[t] < layer or not self.eligible(t, layer):
            return
        dual = self.qs.halting.rule == "dual" and self.may_halt(layer)
        wanted = self.wants_to_halt(t, layer) if dual else t in chosen
        if wanted or layer >= self.forced[t]:
            self.halt[t] = layer

    # 4. Fusion.

    def ready(self, t: int, layer: int) -> bool:
        return self.eligible(t, layer) and (self.qs.halting is None or bool(self.halt[t] > layer))

    def apart(self, a: np.ndarray, b: np.ndarray) -> float:
        assert self.qs.fusion is not None
        norms = (float(np.linalg.norm(a)) + float(np.linalg.norm(b))) / 2
        distance = float(np.linalg.norm(a - b))
        return distance if self.qs.fusion.distance == "raw" else distance / max(norms, TINY)

    def alike(self, t: int, u: int, layer: int) -> bool:
        fusion, h = self.qs.fusion, self.after_block[layer]
        assert fusion is not None
        if not self.judge.below(self.apart(h[t], h[u]), at(fusion.tau_fuse, layer)):
            return False
        if u - t > 1:
            assert fusion.tau_attn is not None
            share = self.model.num_heads // self.model.num_kv_heads
            cosines = [
                cosine(self.q[below, u, n], self.k[below, t, n // share])
                for below in range(1, layer + 1)
                for n in range(self.model.num_heads)
            ]
            if not self.judge.above(float(np.mean(cosines)), fusion.tau_attn):
                return False
        if fusion.tau_ctx is None:
            return True
        mine, its = (self.state[0, max(0, i + 1 - fusion.context) : i + 1].mean(0) for i in (u, t))
        return self.judge.below(self.apart(mine, its), fusion.tau_ctx)

    def fuse(self, u: int, layer: int) -> None:
        """Let u absorb whom it can: everybody before it has been through this already."""
        fusion = self.qs.fusion
        self.merged[layer, u] = self.after_block[layer, u]
        self.size[layer, u] = self.size[layer - 1, u]
        if fusion is None:
            return
        mine = self.size[layer - 1, u]
        if fusion.alpha == "probability":
            mine *= self.likelihood(u, layer)
        self.mass[layer, u] = mine
        if not fusion.first_layer <= layer <= (fusion.last_layer or self.depth - 1):
            return
        partners = [
            t
            for t in range(max(0, u - fusion.window), u)
            if self.ready(u, layer)
            and self.ready(t, layer)
            and not self.absorbed(t, layer, by=u)
            and self.absorber[layer, t] == NEVER
            and self.alike(t, u, layer)
        ]
        if not partners:
            return
        theirs = [self.mass[layer, t] for t in partners]
        if fusion.alpha == "attention":
            mine = self.weight[layer, u, :, u].mean()
            theirs = [self.weight[layer, u, :, t].mean() for t in partners]
        total = mine + sum(theirs)
        parts = [w * self.merged[layer, t] for w, t in zip(theirs, partners, strict=True)]
        self.merged[layer, u] = (mine * self.after_block[layer, u] + sum(parts)) / total
        self.mass[layer, u] = total
        self.size[layer, u] += sum(self.size[layer, t] for t in partners)
        self.absorber[layer, partners] = u
        self.weighed[layer, [u, *partners]] = True

    def likelihood(self, u: int, layer: int) -> float:
        if u == 0:
            return 1 / self.model.vocab_size
        p = softmax(self.net.logits(self.after_block[layer, u - 1]))
        return float(p[self.tokens[u]])

    # 5. Bits, and the end of a layer.

    def close(self, t: int, layer: int) -> None:
        amq, h = self.qs.amq, self.merged[layer, t]
        if amq is not None and layer >= amq.layer and self.ran[layer, t]:
            h = self.quantised("hidden", h, int(self.bits[t]))
        self.state[layer, t] = h

    def resolved(self, layers: int, t: int) -> int:
        """Who stands for t after that many layers."""
        above = int(self.absorber[1 : layers + 1, t].min(initial=NEVER))
        return t if above == NEVER else self.resolved(layers, above)
