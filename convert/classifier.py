"""Convert a sequence classifier: `python -m convert.classifier --source FOLDER --out DIR`.

A Hugging Face `*ForSequenceClassification` checkpoint is a backbone without a vocabulary head, and
a linear `score.weight`. The backbone is converted as any other, its head tied to the embedding,
which nothing reads; the classifier is kept beside it, in `classifier.safetensors`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from convert.errors import ConversionError
from convert.hf_to_flax import Dtype, convert
from convert.mapping import Shape
from convert.sources import HuggingFaceFolder, Source
from convert.staging import check_target, staging
from qs_jax.checkpoint import MANIFEST, read_manifest
from qs_jax.config import ModelConfig
from qs_jax.errors import QuickSilverError
from qs_jax.evaluation.heads import Head

_WEIGHT = "score.weight"


@dataclasses.dataclass
class Arguments:
    """Convert a Hugging Face sequence classifier."""

    source: Path
    """Local folder of a GPT2ForSequenceClassification or LlamaForSequenceClassification."""
    out: Path
    """Folder to write; it must not exist, unless --overwrite."""
    dtype: Dtype = "float32"
    """Parameter dtype of the backbone; the head is float32."""
    overwrite: bool = False
    """Replace an existing checkpoint at --out once the new one is whole."""
    tokenizer: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: True)")] = True
    """Require and copy the tokenizer; --no-tokenizer to work with token ids."""


class Backbone:
    """A sequence classifier seen as a language model whose head is its embedding."""

    def __init__(self, whole: Source) -> None:
        if _WEIGHT not in whole.shapes:
            raise ConversionError(f"{whole.description} has no {_WEIGHT}: not a classifier.")
        self.description = f"{whole.description} (backbone of a sequence classifier)"
        self.config: dict[str, Any] = whole.config | {"tie_word_embeddings": True}
        self.generation_config = whole.generation_config
        self.shapes: dict[str, Shape] = {k: v for k, v in whole.shapes.items() if k != _WEIGHT}
        self.dtypes = whole.dtypes
        self.read = whole.read
        self.write_tokenizer = whole.write_tokenizer


def convert_classifier(
    source: str | Path,
    out: str | Path,
    *,
    dtype: Dtype = "float32",
    overwrite: bool = False,
    tokenizer: bool = True,
) -> tuple[ModelConfig, Head]:
    """Convert backbone and head; `out` appears whole or not at all.

    Args:
      source: Local Hugging Face folder.
      out: Folder to write.
      dtype: Parameter dtype of the backbone.
      overwrite: Replace `out` if it exists.
      tokenizer: Require and copy the tokenizer.

    Raises:
      ConversionError: As `convert.hf_to_flax`, or `score.weight` is missing or misshapen; `out` is
        as it was.
    """
    target = Path(os.path.realpath(out))
    check_target(target, overwrite, MANIFEST)
    if not Path(source).is_dir():
        raise ConversionError(f"{source} is not a folder.")
    whole = HuggingFaceFolder(Path(source))
    backbone = Backbone(whole)
    weight_CD = whole.read(_WEIGHT).astype(np.float32)
    if not np.isfinite(weight_CD).all():
        raise ConversionError(f"{whole.description}: {_WEIGHT} holds NaN or infinite weights.")
    labels = _labels(whole.config, len(weight_CD))
    with staging(target, overwrite) as staged:
        with tempfile.TemporaryDirectory(dir=staged) as inner:
            model, _ = convert(backbone, Path(inner) / "model", dtype=dtype, tokenizer=tokenizer)
            for path in (Path(inner) / "model").iterdir():
                path.rename(staged / path.name)
        if weight_CD.shape[1:] != (model.hidden_size,):
            raise ConversionError(
                f"{_WEIGHT} is {list(weight_CD.shape)}, the model is {model.hidden_size} wide."
            )
        bias_C = np.zeros(len(weight_CD), np.float32)
        head = Head(weight_CD, bias_C, labels, read_manifest(staged)["params"])
        head.save(staged)
    return model, head


def _labels(config: dict[str, Any], classes: int) -> tuple[str, ...]:
    """Names of the classes in the head's order; Hugging Face leaves default names out."""
    named = config.get("id2label")
    if named is None:
        return tuple(f"LABEL_{index}" for index in range(classes))
    if sorted(named) != sorted(map(str, range(classes))):
        raise ConversionError(f"id2label names {sorted(named)}, the head has {classes} classes.")
    return tuple(str(named[str(index)]) for index in range(classes))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    args = tyro.cli(Arguments, prog="python -m convert.classifier", args=argv)
    options = {"dtype": args.dtype, "overwrite": args.overwrite, "tokenizer": args.tokenizer}
    try:
        model, head = convert_classifier(args.source, args.out, **options)
    except (QuickSilverError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}: {model.model_type}, classes {', '.join(head.labels)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
