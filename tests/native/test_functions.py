"""exp, erf and tanh of the native library against fp64, in units in the last place."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fpcompiler import native
from fpcompiler.native import INSTRUCTION_SETS

NATIVE = native.load(native.PATH)
pytestmark = pytest.mark.skipif(isinstance(NATIVE, str), reason="the native library was not built")

FUNCTIONS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "exp": (0, torch.exp),
    "erf": (1, torch.erf),
    "tanh": (2, torch.tanh),
}


def evaluate(function: int, x: np.ndarray, level: int) -> np.ndarray:
    y = np.empty_like(x)
    NATIVE.functions.fpc_evaluate(function, x.ctypes.data, y.ctypes.data, len(x), level)
    return y


def sweep() -> np.ndarray:
    """Return every 1021st fp32 number below 128, of both signs, and the ends of the ranges."""
    most = int(np.float32(128).view(np.int32))
    size = np.arange(0, most, 1021, dtype=np.int32).view(np.float32)
    ends = np.float32([0.625, 0.9375, 4, 88.72283, 88.72284, 87.33655, 103.97208, 104, 3e38])
    size = np.concatenate([size, ends, np.nextafter(ends, np.float32(0))])
    return np.concatenate([size, -size])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_are_below_two_units_in_the_last_place(name: str) -> None:
    index, exact = FUNCTIONS[name]
    x = sweep()
    result = evaluate(index, x, NATIVE.instructions)
    expected = exact(torch.from_numpy(x.astype(np.float64))).numpy()
    held = np.float32(np.clip(expected, -np.finfo(np.float32).max, np.finfo(np.float32).max))
    infinite = expected >= 2.0**128 * (1 - 2.0**-25)
    assert np.array_equal(np.isinf(result), infinite)
    finite = ~infinite
    errors = np.abs(result[finite] - expected[finite]) / np.spacing(np.abs(held[finite]))
    assert errors.max() < 2, x[finite][errors.argmax()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_instruction_sets_give_the_same_bits(name: str) -> None:
    x = sweep()[::7]
    results = [
        evaluate(FUNCTIONS[name][0], x, level)
        for level in range(len(INSTRUCTION_SETS))
        if level <= NATIVE.instructions
    ]
    for result in results[1:]:
        assert np.array_equal(result.view(np.int32), results[0].view(np.int32))


def test_special_values() -> None:
    x = np.float32([math.nan, math.inf, -math.inf, 0.0, -0.0])
    expected = {
        "exp": [math.nan, math.inf, 0.0, 1.0, 1.0],
        "erf": [math.nan, 1.0, -1.0, 0.0, -0.0],
        "tanh": [math.nan, 1.0, -1.0, 0.0, -0.0],
    }
    for name, values in expected.items():
        result = evaluate(FUNCTIONS[name][0], x, NATIVE.instructions)
        assert np.array_equal(result, np.float32(values), equal_nan=True)
        assert np.array_equal(np.signbit(result[1:]), np.signbit(np.float32(values[1:])))
