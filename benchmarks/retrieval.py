"""Passkeys and RULER's needles, the dense model against presets.

`python -m benchmarks.retrieval --ckpt DIR` hides keys as `python -m qs_jax evaluate --passkeys` and
runs those tasks of RULER (Hsieh et al. 2024) that need no download, in lm-evaluation-harness.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro

from benchmarks import environment
from benchmarks.tables import markdown
from qs_jax.errors import exit_code
from qs_jax.evaluation import passkey

LENGTHS = (512, 1024, 2048)
NEEDLES, NEEDLE_LENGTHS = ("niah_single_1", "niah_multikey_2"), (1024, 2048)


@dataclasses.dataclass
class Arguments:
    """Look for keys and needles."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    presets: tuple[str, ...] = ("balanced",)
    """Compared with the dense model."""
    passkeys: int = 32
    """Keys of each length."""
    needles: int = 20
    """Prompts of each task of RULER and length."""
    out: Path = environment.RESULTS / "retrieval.json"
    """JSON file."""


def run(args: Arguments) -> None:
    """Give the dense model and each preset the same prompts."""
    environment.check_out(args.out)
    from qs_jax.evaluation.lm_eval_adapter import QSJaxLM

    found, about = {}, {}
    for preset in ("off", *args.presets):
        model = QSJaxLM(str(args.ckpt), preset, batch_size=4)
        found[preset], about[preset] = find(model, args), model.get_model_info()
    rows = [
        {"probe": probe, "tokens": tokens}
        | {name: passkey.count_pairs(dense_P, found[name][probe, tokens]) for name in args.presets}
        for (probe, tokens), dense_P in found["off"].items()
    ]
    about |= {"ckpt": args.ckpt.name, "lm_eval": importlib.metadata.version("lm_eval")}
    environment.write("retrieval", {"about": about, "rows": rows}, args.out)


def find(model: Any, args: Arguments) -> dict[tuple[str, int], np.ndarray]:
    """Which prompts of each probe and length a model of the harness answers rightly."""
    from lm_eval import simple_evaluate

    found: dict[tuple[str, int], np.ndarray] = {}
    for length in LENGTHS:
        prompts = passkey.make_passkeys(model.tokenizer, [length], count=args.passkeys)
        asked = (model.params, model.cfg, model.tokenizer, prompts)
        title = f"{model.preset}, passkeys of {length} tokens"
        found["passkey", length] = passkey.find_passkeys(*asked, title=title)
    for length in NEEDLE_LENGTHS:
        metadata = {"tokenizer": str(model.folder), "max_seq_lengths": [length]}
        options: Any = {"limit": args.needles, "metadata": metadata, "bootstrap_iters": 0}
        report: Any = simple_evaluate(model, tasks=list(NEEDLES), **options)
        for task in NEEDLES:
            samples = sorted(report["samples"][task], key=lambda sample: sample["doc_id"])
            found[task, length] = np.array([sample[str(length)] == 1 for sample in samples])
    return found


def table(content: dict[str, Any]) -> pd.DataFrame:
    """Prompts that the dense model and each preset answered, and what a preset lost."""
    lines, presets = [], [name for name in content["rows"][0] if name not in ("probe", "tokens")]
    for row in content["rows"]:
        line, dense = (
            {"probe": f"`{row['probe']}`", "tokens": f"{row['tokens']:,}"},
            row[presets[0]],
        )
        line |= {"prompts": dense["prompts"], "dense": dense["both"] + dense["only_dense"]}
        for name in presets:
            counts = row[name]
            shown = f"{counts['both'] + counts['only_preset']} (-{counts['only_dense']} "
            line[f"`{name}`"] = f"{shown}+{counts['only_preset']}, p {counts['mcnemar_p']:.2g})"
        lines.append(line)
    return pd.DataFrame(lines)


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.retrieval", args=argv)
    run(args)
    print(markdown(table(json.loads(args.out.read_bytes()))))


if __name__ == "__main__":
    sys.exit(exit_code(main))
