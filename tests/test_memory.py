"""Conversion streams."""

import pytest

from benchmarks.convert_memory import measure


@pytest.mark.slow
def test_converting_two_gigabytes_needs_less_than_1_4_of_their_size():
    result = measure(gigabytes=2.0)
    assert result["checkpoint_bytes"] >= 2e9
    assert result["peak_over_checkpoint"] < 1.4
