"""A score of your own: the key norm (Devoto et al. 2024), by which tokens stop in a prompt.

Keys of low norm get much attention ("A Simple and Effective L2 Norm-Based Strategy for KV Cache
Compression"), so the tokens whose keys have the highest norms stop first. Run it with
`python -m examples.key_norm`, or take the preset it writes to any command as `--preset FILE.json`.
"""

import sys
from pathlib import Path

import jax.numpy as jnp
import tyro

from qs_jax import HaltingConfig, KVSkipConfig, QuickSilverConfig, presets
from qs_jax.errors import exit_code
from qs_jax.mechanisms.custom import Signals


def key_norm(signals: Signals):
    """Minus the norm of each token's keys, mean over the heads, `[B, T]`: lower stops sooner."""
    return -jnp.linalg.norm(signals.keys_BTKH.astype(jnp.float32), axis=-1).mean(-1)


def run(out: Path = Path("key-norm.json"), layer: int = 24, share: float = 0.5) -> None:
    """Write a preset that stops a share of each prompt after a layer and skips its deeper keys."""
    score = "examples.key_norm:key_norm"  # what JSON has of the function above
    halting = HaltingConfig(rule="quota", layers=(layer,), quota=(share,), score=score)
    print(presets.save(out, QuickSilverConfig(halting=halting, kv_skip=KVSkipConfig("skip"))))


def main(argv=None) -> None:
    """The command line."""
    tyro.cli(run, args=argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
