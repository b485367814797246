"""Nothing moved on the embedded model; tests/engine/test_laws.py looks at the tiny ones."""

import pytest

import qs_jax
from tests import goldens


@pytest.fixture(scope="module")
def loaded(embedded_checkpoint):
    params, model = qs_jax.load(embedded_checkpoint, dtype="float32")
    return params, model, goldens.embedded_tokens(qs_jax.load_tokenizer(embedded_checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize("name", goldens.EMBEDDED)
def test_embedded_model(loaded, name):
    goldens.assert_golden(f"embedded-{name}", goldens.embedded(*loaded, name), atol=1e-3)
