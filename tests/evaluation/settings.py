"""Halting with skipped keys, by quota and by drift, that acts on the tiny models."""

from qs_jax.config import HaltingConfig, KVSkipConfig, QuickSilverConfig


def quota(share: float = 0.5) -> QuickSilverConfig:
    halting = HaltingConfig(rule="quota", layers=(1,), quota=(share,), entropy=None)
    skip = KVSkipConfig("skip")
    return QuickSilverConfig(halting=halting, kv_skip=skip, sink_tokens=0, recent_tokens=2)


def dual(tau: float = 3.5) -> QuickSilverConfig:
    halting = HaltingConfig(entropy=None, tau_drift=tau, window=None)
    return QuickSilverConfig(halting=halting, kv_skip=KVSkipConfig("skip"), recent_tokens=2)
