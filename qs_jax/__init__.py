"""QuickSilver in JAX: a frozen language model that does less work per token."""

from qs_jax import accounting, presets, testing
from qs_jax.calibration import calibrate, fit_kv_maps
from qs_jax.config import (
    AMQConfig,
    Config,
    FusionConfig,
    HaltingConfig,
    KVSkipConfig,
    ModelConfig,
    QuickSilverConfig,
    Speculation,
)
from qs_jax.engine.devices import make_mesh, replicate, shard
from qs_jax.engine.generate import (
    GenerateOutput,
    StreamStep,
    TokenStream,
    generate,
    prefill,
    stream,
)
from qs_jax.engine.inputs import TokenOverrides
from qs_jax.engine.prompt_cache import PromptCache
from qs_jax.engine.score import ScoreOutput, score
from qs_jax.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    NonFiniteError,
    OutputError,
    QuickSilverError,
)
from qs_jax.load import load, load_tokenizer
from qs_jax.mechanisms.kv_maps import KVMaps
from qs_jax.record import Record

__all__ = [
    # Checkpoints
    "load",
    "load_tokenizer",
    # Several devices
    "make_mesh",
    "replicate",
    "shard",
    # Running a model
    "generate",
    "prefill",
    "score",
    "stream",
    "GenerateOutput",
    "PromptCache",
    "ScoreOutput",
    "StreamStep",
    "TokenStream",
    "Record",
    "TokenOverrides",
    # Fitting a preset to a quality budget
    "calibrate",
    # Configuration
    "Config",
    "ModelConfig",
    "QuickSilverConfig",
    "HaltingConfig",
    "KVSkipConfig",
    "FusionConfig",
    "AMQConfig",
    "Speculation",
    "presets",
    # Counting what was saved
    "accounting",
    # Maps of the "extrapolate" policy
    "KVMaps",
    "fit_kv_maps",
    # For tests of your own mechanism
    "testing",
    # Errors
    "CheckpointError",
    "ConfigError",
    "InputError",
    "NonFiniteError",
    "OutputError",
    "QuickSilverError",
]
