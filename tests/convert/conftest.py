"""A Hugging Face folder to convert."""

import pytest

from tests.convert.folders import llama_tensors, write_folder


@pytest.fixture(scope="module")
def tensors():
    return llama_tensors()[0]


@pytest.fixture
def source(tmp_path, tensors):
    return write_folder(tmp_path / "hf", tensors)
