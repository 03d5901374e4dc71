"""The native layers against the definition, on each instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fpcompiler
from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, parse_format
from fpcompiler.native import INSTRUCTION_SETS, library
from fpcompiler.native.linear import Arithmetic
from fpcompiler.numerics import dequantize, dequantize_packed, quantize, quantize_packed
from fpcompiler.operand import Operand
from fpcompiler.runtime import native_steps, reference
from fpcompiler.runtime.arithmetic import arithmetic_for, integers_of
from fpcompiler.runtime.native import NativeLinear
from fpcompiler.runtime.native_steps import NativeLayer, NativeQuantizer

NATIVE = library()
pytestmark = pytest.mark.skipif(NATIVE is None, reason="the native library was not built")

LEVELS = [
    pytest.param(
        level,
        id=name,
        marks=pytest.mark.skipif(NATIVE is None or not NATIVE.has(level), reason=f"no {name} here"),
    )
    for level, name in enumerate(INSTRUCTION_SETS)
]
WEIGHTS = {
    "row": "e2m1@row:f32",
    "mx": "e2m1@row:f32/block32:e8m0",
    "nv": "e2m1@tensor:f32/block16:e4m3",
    "g128": "e2m1@block128:f32",
    "e3m0": "e3m0@row:f32",
    "e1m2": "e1m2@row:f32/block64:e8m0",
    "int8": "e1m6@row:f32",
    "int6": "e1m4@row:f32/block64:e8m0",
    "mx6": "e2m3@block32:e8m0",
    "mx8": "e4m3@block32:e8m0",
    "e3m2": "e3m2@row:f32",
    "e2m5": "e2m5@tensor:f32/block16:e4m3",
}
INPUTS = {
    "a4": "e2m1@token:f32",
    "a6": "e2m3@token:f32",
    "a6mx": "e2m3@block32:e8m0",
    "nv": "e2m1@tensor:f32/block16:e4m3",
    "a8": "e4m3@block32:e8m0",
    "e3m4": "f8E3M4FN@token:f32",
    "int8": "e1m6@token:f32",
    "none": "",
}
SHAPES = [(1, 1, 1), (17, 130, 7), (100, 40, 3), (130, 520, 113)]


def operand(text: str) -> Operand | None:
    return Operand.parse(text) if text else None


def case(n: int, k: int, m: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * n + k + m)
    spread = torch.randn(m, 1, generator=generator).exp()
    w = torch.randn(n, k, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    return w, (torch.randn(m, k, generator=generator) * spread).to(dtype)


def both(
    w: Tensor, x: Tensor, weight: Operand, inputs: Operand | None, level: int, bias: Tensor | None
) -> tuple[NativeLinear, Tensor, Tensor, Tensor]:
    """Return the native layer, its result, the reference's, and the bound of their distance.

    Sums of K products of fp32 in any order are within K * 2**-24 of the sum of the magnitudes;
    scales, bias and the result are rounded a few times more.
    """
    packed, scales = quantize_packed(w, weight)
    parts = [packed, *scales]
    given_x = [x]
    values = x.double()
    if inputs:
        codes, x_scales = quantize(x, inputs)
        given_x = [codes, *x_scales]
        values = dequantize(codes, x_scales, inputs).double()
    k = w.shape[1]
    expected = reference.linear(given_x, parts, bias, inputs, weight, k, x.dtype)
    native = NativeLinear(parts, bias, inputs, weight, k, x.dtype, "layer", level)
    total = values.abs() @ dequantize_packed(packed, scales, weight, k).double().abs().T
    digits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[x.dtype]
    bound = (k + 8) * 2.0**-24 * 2 * total + 2 * expected.double().abs() * 2.0**-digits + 1e-30
    return native, native(x, x.dtype), expected, bound


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_layer_is_what_the_reference_gives(weight: str, inputs: str, level: int) -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            w, x = case(*shape, dtype=dtype)
            bias = torch.linspace(-1, 1, shape[0]) if shape[0] % 2 == 0 else None
            kinds = Operand.parse(WEIGHTS[weight]), operand(INPUTS[inputs])
            native, result, expected, bound = both(w, x, *kinds, level, bias)
            exact = native.kind.arithmetic is Arithmetic.INT8 and not native.kind.group
            if exact:
                assert torch.equal(result, expected)
            else:
                assert bool(((result.double() - expected.double()).abs() <= bound).all())


@pytest.mark.parametrize(
    ("weight", "inputs"),
    [("e2m1", "e2m1"), ("e2m1", "e2m3"), ("e1m6", "e2m3"), ("e1m4", "e1m6"), ("e1m6", "e1m6")],
)
@pytest.mark.parametrize(
    ("n", "k", "m"),
    [(64, 16384, 1), (3, 16383, 2), (65, 4097, 5), (129, 31, 130), (576, 1152, 16), (33, 8, 6)],
)
@pytest.mark.parametrize("level", LEVELS)
def test_integer_sums_are_exact_bit_for_bit(
    n: int, k: int, m: int, weight: str, inputs: str, level: int
) -> None:
    """Against sums in fp64, which holds them all; an fp32 sum of INT8 is exact up to K = 1040."""
    w_operand, x_operand = Operand.parse(f"{weight}@row:f32"), Operand.parse(f"{inputs}@token:f32")
    bias = torch.ones(n)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w, x = case(n, k, m, dtype)
        packed, (w_scale,) = quantize_packed(w, w_operand)
        codes, (x_scale,) = quantize(x, x_operand)
        native = NativeLinear(
            [packed, w_scale], bias, x_operand, w_operand, k, dtype, instructions=level
        )
        assert native.kind.arithmetic is Arithmetic.INT8
        ones = torch.ones(1, 1)
        sums = dequantize(codes, (ones,), x_operand).double() @ (
            dequantize_packed(packed, (ones,), w_operand, k).double().T
        )
        expected = (sums.float() * x_scale * w_scale.T + bias).to(dtype)
        assert torch.equal(native(x, dtype), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("m", [1, 2, 5, 17])
def test_threads_that_share_blocks_of_outputs(m: int, level: int) -> None:
    """There are so few outputs and so many inputs that a block is cut into halves."""
    before = torch.get_num_threads()
    w, x = case(90, 9000, m)
    weight, inputs = Operand.parse("e2m1@row:f32"), Operand.parse("e2m3@token:f32")
    torch.set_num_threads(3)
    try:
        _, result, expected, _ = both(w, x, weight, inputs, level, None)
        _, floats, floats_expected, bound = both(w, x, weight, None, level, None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(result, expected)
    assert bool(((floats.double() - floats_expected.double()).abs() <= bound).all())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("inputs", ["e2m1", "e2m3", "e1m4", "e1m6"])
@pytest.mark.parametrize("weight", ["e2m1", "e1m2", "e3m0"])
def test_sums_of_the_largest_integers_do_not_saturate(weight: str, inputs: str, level: int) -> None:
    """Rows of nothing but the largest value and its negative, of one sign or of both."""
    ones, mixed = torch.ones(1, 352), torch.ones(1, 352)
    mixed[:, 1::3] = -1
    w = torch.cat([ones, -ones, mixed]).repeat(12, 1)
    for blocks in ("@row:f32", "@block32:f32", "@block128:f32"):
        kinds = Operand.parse(weight + blocks), Operand.parse(f"{inputs}@token:f32")
        for m in (1, 2, 5, 12):
            native, result, expected, bound = both(w, w[:m], *kinds, level, None)
            assert native.kind.arithmetic is Arithmetic.INT8
            assert bool(((result.double() - expected.double()).abs() <= bound).all())


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 200),
    m=st.integers(0, 130),
    weight=st.sampled_from(sorted(WEIGHTS)),
    inputs=st.sampled_from(sorted(INPUTS)),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_any_shape(
    n: int, k: int, m: int, weight: str, inputs: str, threads: int, data: st.DataObject
) -> None:
    assert NATIVE is not None
    level = data.draw(st.sampled_from([i for i in range(len(INSTRUCTION_SETS)) if NATIVE.has(i)]))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        w, x = case(n, k, m)
        kinds = Operand.parse(WEIGHTS[weight]), operand(INPUTS[inputs])
        _, result, expected, bound = both(w, x, *kinds, level, None)
    finally:
        torch.set_num_threads(before)
    assert result.shape == (m, n)
    assert bool(((result.double() - expected.double()).abs() <= bound).all())


@pytest.mark.parametrize("level", LEVELS)
def test_scales_at_the_ends_of_their_range(level: int) -> None:
    """Products of scales leave the range of fp32 exponents only where results do."""
    weight, inputs = Operand.parse(WEIGHTS["mx"]), Operand.parse(INPUTS["a6mx"])
    w, x = case(70, 96, 8)
    for power in (-100, -60, 60, 100):
        _, result, expected, bound = both(w, x * 2.0**power, weight, inputs, level, None)
        assert bool(((result.double() - expected.double()).abs() <= bound).all())
        _, result, expected, bound = both(w * 2.0**power, x * 2.0**-20, weight, inputs, level, None)
        assert bool(((result.double() - expected.double()).abs() <= bound).all())


def test_every_format_in_integers_has_its_values() -> None:
    found = {name for name in FORMATS if FORMATS[name].signed and integers_of(FORMATS[name])}
    assert found >= {"f4E2M1FN", "f4E1M2FN", "f4E3M0FN", "f6E2M3FN", "f6E1M4FN", "f8E1M6FN"}
    assert "f6E3M2FN" not in found
    for name in found:
        spec = parse_format(name)
        integers = integers_of(spec)
        assert integers is not None
        assert [value * spec.smallest for value in integers] == list(spec.values)


def test_the_arithmetic_follows_formats_and_processor() -> None:
    w, a6, a8 = (Operand.parse(text) for text in (WEIGHTS["mx"], INPUTS["a6mx"], INPUTS["a8"]))
    assert arithmetic_for(a6, w, 64, torch.float32, 0) is Arithmetic.INT8
    bf16 = INSTRUCTION_SETS.index("AVX-512 BF16")
    overflowing = 1 << 24
    assert arithmetic_for(a6, w, overflowing, torch.float32, bf16) is not Arithmetic.INT8
    int8 = Operand.parse("e1m6@row:f32")
    most = (2**31 - 1) // (2 * 127 * 127)
    assert arithmetic_for(int8, int8, most, torch.float32, bf16) is Arithmetic.INT8
    assert arithmetic_for(int8, int8, most + 1, torch.float32, bf16) is not Arithmetic.INT8
    assert arithmetic_for(a8, w, 64, torch.float32, bf16) is Arithmetic.BF16
    assert arithmetic_for(a8, w, 64, torch.float32, bf16 - 1) is Arithmetic.FLOAT32
    assert arithmetic_for(None, w, 64, torch.bfloat16, bf16) is Arithmetic.BF16
    neon = INSTRUCTION_SETS.index("NEON dot product")
    assert arithmetic_for(a8, w, 64, torch.float32, neon) is Arithmetic.FLOAT32
    assert arithmetic_for(None, w, 64, torch.bfloat16, neon) is Arithmetic.FLOAT32
    assert arithmetic_for(a6, w, 64, torch.float32, neon) is Arithmetic.INT8
    assert arithmetic_for(None, w, 64, torch.float32, bf16) is Arithmetic.FLOAT32
    real_blocks = Operand.parse("e4m3@block32:f32")
    assert arithmetic_for(real_blocks, w, 64, torch.float32, bf16) is Arithmetic.FLOAT32


def test_values_that_are_no_numbers_name_the_layer() -> None:
    w, x = case(16, 64, 2)
    weight, inputs = Operand.parse(WEIGHTS["mx"]), Operand.parse(INPUTS["a6mx"])
    packed, scales = quantize_packed(w, weight)
    native = NativeLinear([packed, *scales], None, inputs, weight, 64, layer="up")
    x[1, 3] = float("nan")
    with pytest.raises(NumericsError, match="layer 'up': input holds NaN/Inf"):
        native(x, torch.float32)


def test_an_input_of_another_kind_is_refused() -> None:
    w, x = case(16, 64, 2)
    weight = Operand.parse(WEIGHTS["row"])
    packed, scales = quantize_packed(w, weight)
    a6, a4 = (
        NativeLinear([packed, *scales], None, Operand.parse(INPUTS[name]), weight, 64)
        for name in ("a6", "a4")
    )
    with pytest.raises(NumericsError, match="was prepared as"):
        a4.multiply(a6.prepare(x), torch.float32)


class Siblings(nn.Module):
    """Two layers that share an input, and one whose weights have six bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(torch.tanh(self.a(x) * self.b(x)))
        return result


@pytest.mark.parametrize("bits", [4, 6])
def test_layers_share_an_input_that_is_prepared_once(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one of the layers is not taken: then its quantizer stays as it is."""
    monkeypatch.setattr(
        native_steps, "takes", lambda operand, n, k: operand.format.storage_bits <= bits
    )
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    scheme = "w4a6-row; c: w=e2m3@row:f32,a=e2m3@token:f32"
    native = fpcompiler.compile(Siblings().eval(), scheme, example_inputs=(x,))
    plain = fpcompiler.compile(Siblings().eval(), scheme, example_inputs=(x,), target="reference")
    functions = [instruction.function for instruction in native._ready()._code]
    assert sum(isinstance(f, NativeQuantizer) for f in functions) == (1 if bits == 4 else 2)
    assert sum(isinstance(f, NativeLayer) for f in functions) == (2 if bits == 4 else 3)
    assert not any(
        isinstance(i.function, NativeLayer | NativeQuantizer) for i in plain._ready()._code
    )
    assert torch.equal(native(x), plain(x))


def test_without_the_library_the_same_artifact_runs_on_the_reference(tmp_path, monkeypatch) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    native = fpcompiler.compile(Siblings().eval(), "w4a6-row", example_inputs=(x,))
    native.save(tmp_path / "m.fpc")
    monkeypatch.setenv("FPC_NATIVE", "0")
    library.cache_clear()
    try:
        without = fpcompiler.load(tmp_path / "m.fpc")
        assert torch.equal(without(x), native(x))
        code = without._ready()._code
        assert not any(isinstance(i.function, NativeLayer) for i in code)
    finally:
        monkeypatch.undo()
        library.cache_clear()
