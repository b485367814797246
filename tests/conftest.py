"""The strict environment every test runs in.

Set before JAX is imported: four virtual CPU devices. Then: jaxtyping annotations checked by
beartype at every call, silent rank promotion is an error, and (pyproject.toml) so is any warning.
Most of the suite's time is compilation: by default XLA optimises little.
"""

import os
from importlib.metadata import version

FLAGS = " --xla_force_host_platform_device_count=4"
QUICK = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"  # `make test-all`: 0
if QUICK and version("jaxlib") < "0.12":  # later ones stop at flags they do not know
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # a quarter less compilation
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["QS_JAX_CACHE"] = "off"  # the user's compiled programs are not for tests
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

install_import_hook(["qs_jax", "convert"], "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

from qs_jax.models import cpu

# References are float32, so it is the default whatever processor this is.
cpu.CPU_INFO = cpu.Path("nowhere")

import gc
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Compilation makes first examples slow; CI must not depend on luck.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ci")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


# Compiled programs map memory; XLA crashes beyond Linux's 65,530 maps a process. Twice in a module.
MOST_MAPS = 20_000


def forget_programs(most_maps: int) -> None:
    """Let go of compiled programs where this process has more maps than that."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > most_maps:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Between modules."""
    yield
    forget_programs(MOST_MAPS)


@pytest.fixture(autouse=True)
def not_too_many_programs() -> Iterator[None]:
    """Between tests."""
    yield
    forget_programs(2 * MOST_MAPS)


@pytest.fixture(scope="session")
def research_data() -> Path:
    """The folder of research data that stands beside the project, where there is one."""
    if not SHARED.is_dir():
        pytest.skip("the research data folder ../shared/data is not here")
    return SHARED


@pytest.fixture(scope="session")
def embedded_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded real model, converted once a session."""
    from convert.errors import ConversionError
    from convert.gguf_source import embedded_path
    from convert.hf_to_flax import convert

    try:
        embedded_path()
    except ConversionError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("embedded") / "smollm2-135m"
    convert("embedded", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama checkpoint with its tokenizer; not to be changed."""
    from convert.hf_to_flax import convert
    from tests.convert.folders import llama_tensors, write_folder

    folder = tmp_path_factory.mktemp("tiny")
    convert(str(write_folder(folder / "hf", llama_tensors()[0])), folder / "ckpt")
    return folder / "ckpt"
