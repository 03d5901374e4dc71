"""Nothing is read or written beside what was given, for any shape, operand, type and processor."""

from __future__ import annotations

import ctypes
import faulthandler
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompiler.native import INSTRUCTION_SETS, library
from fpcompiler.numerics import quantize, quantize_packed
from fpcompiler.numerics.compiled import INPUTS, operand_struct
from fpcompiler.operand import Operand
from fpcompiler.runtime.fused import ACTIVATIONS
from fpcompiler.runtime.native import NativeLinear
from tests.native.guarded import Guarded, survives
from tests.runtime.test_native import INPUTS as X_OPERANDS
from tests.runtime.test_native import WEIGHTS as W_OPERANDS

NATIVE = library()
pytestmark = pytest.mark.skipif(NATIVE is None, reason="the native library was not built")
LEVELS = st.sampled_from(
    [level for level in range(len(INSTRUCTION_SETS)) if NATIVE and NATIVE.has(level)] or [0]
)
DTYPES = st.sampled_from(list(INPUTS))
LINE = 64  # bytes that weights and prepared activations are aligned to
OTHERS = ("e3m2@token:f32/block32:e8m0", "e4m3@block128:f32", "e2m3", "e5m2@row:f32/block16:e4m3")


@dataclass(frozen=True)
class Layer:
    """A layer and a call of it; ``gap`` values lie between rows of inputs and of results."""

    n: int
    k: int
    m: int
    weight: str
    inputs: str
    dtype: torch.dtype
    level: int
    gap: int
    at_end: bool
    bias: bool
    activation: str


layers = st.builds(
    Layer,
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    m=st.integers(1, 40),
    weight=st.sampled_from(sorted(W_OPERANDS.values())),
    inputs=st.sampled_from(sorted(X_OPERANDS.values())),
    dtype=DTYPES,
    level=LEVELS,
    gap=st.sampled_from([0, 0, 1, 5]),
    at_end=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from(["", *ACTIVATIONS]),
)


def multiply(case: Layer) -> None:
    """Call every function of linear layers on guarded memory, and compare with plain memory."""
    assert NATIVE is not None
    call = NATIVE.functions
    weight = Operand.parse(case.weight)
    inputs = Operand.parse(case.inputs) if case.inputs else None
    generator = torch.Generator().manual_seed(case.n + case.k)
    packed, scales = quantize_packed(torch.randn(case.n, case.k, generator=generator), weight)
    bias = torch.randn(case.n, generator=generator) if case.bias else None
    linear = NativeLinear(
        [packed, *scales], bias, inputs, weight, case.k, case.dtype, "", case.level, case.activation
    )
    x = torch.randn(case.m, case.k + case.gap, generator=generator).to(case.dtype)
    expected = linear(x[:, : case.k], case.dtype)

    w, a = linear._struct, linear._activations
    row_scale = Guarded.of(linear._scale, case.at_end)
    padded = None if linear._bias is None else Guarded.of(linear._bias, case.at_end)
    w.row_scale, w.bias = row_scale.address, padded and padded.address
    data = Guarded(call.fpc_weight_bytes(w), case.at_end, LINE)
    codes = Guarded.of(packed, case.at_end)
    blocks = Guarded.of(scales[-1], case.at_end) if weight.block else None
    repeat = weight.block.block // linear.kind.group if weight.block else 1
    call.fpc_repack(
        w, codes.address, packed.shape[1], blocks and blocks.address, repeat, data.address, 1
    )
    assert data.read() == ctypes.string_at(linear._data.data_ptr(), linear._data.nbytes)
    w.data = data.address

    prepared = Guarded(call.fpc_prepared_bytes(w, case.m), case.at_end, LINE)
    values = Guarded.of(x.view(-1)[: x.numel() - case.gap], case.at_end)
    arguments = values.address, INPUTS[case.dtype], case.m, x.shape[1], prepared.address
    assert call.fpc_prepare(w, a, *arguments, 1, case.level) == 0
    check_product(case, w, prepared, expected)
    if inputs:
        from_codes(case, w, a, prepared, x, inputs)
        check_product(case, w, prepared, expected)


def from_codes(case: Layer, w, a, prepared: Guarded, x: torch.Tensor, inputs: Operand) -> None:
    assert NATIVE is not None
    codes, scales = quantize(x[:, : case.k], inputs)
    parts = [Guarded.of(part, case.at_end) for part in (codes, *scales)]
    outer = parts[1].address if inputs.outer else None
    block = parts[-1].address if inputs.block else None
    arguments = parts[0].address, outer, block, case.m, prepared.address
    assert NATIVE.functions.fpc_prepare_codes(w, a, *arguments, 1, case.level) == 0


def check_product(case: Layer, w, prepared: Guarded, expected: torch.Tensor) -> None:
    assert NATIVE is not None
    prepared.read()
    stride = case.n + case.gap
    y = Guarded((case.m * stride - case.gap) * expected.element_size(), case.at_end)
    arguments = case.m, y.address, None, INPUTS[case.dtype], stride
    assert NATIVE.functions.fpc_multiply(w, prepared.address, *arguments, 1, case.level) == 0
    gap = b"\xa5" * (case.gap * expected.element_size())
    rows = [ctypes.string_at(row.data_ptr(), row.nbytes) for row in expected]
    assert y.read() == gap.join(rows)
    residual = torch.linspace(-3, 3, expected.numel()).view(expected.shape).to(case.dtype)
    wide = torch.nn.functional.pad(residual, (0, case.gap)).flatten()[: case.m * stride - case.gap]
    added = Guarded.of(wide, case.at_end)
    arguments = case.m, y.address, added.address, INPUTS[case.dtype], stride
    assert NATIVE.functions.fpc_multiply(w, prepared.address, *arguments, 1, case.level) == 0
    rows = [ctypes.string_at(row.data_ptr(), row.nbytes) for row in expected + residual]
    assert y.read() == gap.join(rows)


@dataclass(frozen=True)
class Rows:
    """Rows to quantize; ``gap`` values lie between them."""

    rows: int
    k: int
    operand: str
    packed: bool
    dtype: torch.dtype
    level: int
    gap: int
    at_end: bool


rows = st.builds(
    Rows,
    rows=st.integers(1, 40),
    k=st.integers(1, 300),
    operand=st.sampled_from(
        sorted({*OTHERS, *W_OPERANDS.values(), *filter(None, X_OPERANDS.values())})
    ),
    packed=st.booleans(),
    dtype=DTYPES,
    level=LEVELS,
    gap=st.sampled_from([0, 0, 1, 5]),
    at_end=st.booleans(),
)


def encode(case: Rows) -> None:
    """Quantize guarded rows into guarded memory, and compare with plain memory."""
    assert NATIVE is not None
    operand = Operand.parse(case.operand)
    generator = torch.Generator().manual_seed(case.rows + case.k)
    x = torch.randn(case.rows, case.k + case.gap, generator=generator).to(case.dtype)
    codes, scales = (quantize_packed if case.packed else quantize)(x[:, : case.k], operand)
    values = Guarded.of(x.view(-1)[: x.numel() - case.gap], case.at_end)
    out = [Guarded(part.nbytes, case.at_end) for part in (codes, *scales)]
    bits = operand.format.storage_bits if case.packed else 8
    status = NATIVE.functions.fpc_quantize(
        ctypes.byref(operand_struct(operand, bits)), values.address, INPUTS[case.dtype],
        case.rows, case.k, x.shape[1], out[0].address,
        out[1].address if operand.outer else None, out[-1].address if operand.block else None,
        1, case.level,
    )  # fmt: skip
    assert status == 0
    for memory, part in zip(out, (codes, *scales), strict=True):
        assert memory.read() == ctypes.string_at(part.data_ptr(), part.nbytes)


@settings(deadline=None, max_examples=60)
@given(layers)
def test_layers(case: Layer) -> None:
    survives(lambda: multiply(case))


@settings(deadline=None, max_examples=40)
@given(rows)
def test_quantizing(case: Rows) -> None:
    survives(lambda: encode(case))


@pytest.mark.slow
@settings(deadline=None, max_examples=1500)
@given(layers)
def test_many_layers(case: Layer) -> None:
    survives(lambda: multiply(case))


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@given(rows)
def test_quantizing_many_rows(case: Rows) -> None:
    survives(lambda: encode(case))


def crashes(work: Callable[..., object], *arguments: int) -> bool:
    def quietly() -> None:
        faulthandler.disable()
        work(*arguments)

    try:
        survives(quietly)
    except AssertionError:
        return True
    return False


def test_what_is_touched_beside_the_memory_is_noticed() -> None:
    """Otherwise the tests above could not fail."""
    assert not crashes(lambda: None)
    last, first = Guarded(8, at_end=True), Guarded(8, at_end=False)
    assert crashes(ctypes.string_at, last.address + 8, 1)
    assert crashes(ctypes.string_at, first.address - 1, 1)
    assert not crashes(ctypes.string_at, last.address, 8)
    sealed = Guarded.of(torch.zeros(4), at_end=True)
    assert crashes(ctypes.memset, sealed.address, 0, 1)
    near = Guarded(60, at_end=True, alignment=LINE)
    assert near.read() == b"\xa5" * 60
    ctypes.memset(near.address + 60, 0, 1)
    with pytest.raises(AssertionError, match="around the result"):
        near.read()
