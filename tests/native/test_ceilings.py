"""The loops that measure the machine do what they say that they do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompiler import native

pytestmark = pytest.mark.skipif(
    native.why_missing() is not None, reason="the native library was not built"
)


def functions():
    return native.library().functions


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3000), st.integers(0, 63), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_every_byte_is_read_once(size: int, offset: int, threads: int, seed: int) -> None:
    memory = np.random.default_rng(seed).integers(0, 256, size + offset, dtype=np.uint8)
    data = memory[offset:]
    words = np.concatenate([data, np.zeros(-size % 8, np.uint8)]).view(np.uint64)
    expected = int(np.bitwise_xor.reduce(words)) if size else 0
    assert functions().fpc_read_bytes(data.ctypes.data, size, threads) == expected


@pytest.mark.parametrize("arithmetic", [0, 1, 2])
def test_operations_grow_with_iterations_and_threads(arithmetic: int) -> None:
    peak = functions().fpc_peak
    one = peak(arithmetic, 1, 1)
    assert one > 0
    assert peak(arithmetic, 1000, 1) == 1000 * one
    assert peak(arithmetic, 1000, 3) == 3000 * one


def test_another_arithmetic_does_nothing() -> None:
    assert [functions().fpc_peak(arithmetic, 1000, 1) for arithmetic in (-1, 3)] == [0, 0]
