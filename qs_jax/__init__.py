"""QuickSilver in JAX: a frozen language model that does less work per token."""

from qs_jax import presets
from qs_jax.checkpoint import load, load_tokenizer
from qs_jax.config import Config, ModelConfig, QuickSilverConfig
from qs_jax.engine.generate import GenerateOutput, StreamStep, generate, stream
from qs_jax.engine.scoring import ScoreOutput, score
from qs_jax.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    NonFiniteError,
    QuickSilverError,
)

__all__ = [
    # Checkpoints
    "load",
    "load_tokenizer",
    # Running a model
    "generate",
    "score",
    "stream",
    "GenerateOutput",
    "ScoreOutput",
    "StreamStep",
    # Configuration
    "Config",
    "ModelConfig",
    "QuickSilverConfig",
    "presets",
    # Errors
    "CheckpointError",
    "ConfigError",
    "InputError",
    "NonFiniteError",
    "QuickSilverError",
]
