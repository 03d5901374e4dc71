"""The native library against the PyTorch implementation: every result bit for bit."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fpcompiler import native, numerics
from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.native import INSTRUCTION_SETS
from fpcompiler.numerics import scaling
from fpcompiler.operand import Operand

LIBRARY = native.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native library was not built")

SIGNED = [spec for spec in FORMATS.values() if spec.signed]
# Those with the fewest and the most bits of either kind, and those that are used most.
ELEMENTS = (
    "f4E2M1FN", "f4E3M0FN", "f6E2M3FN", "f6E5M0FN", "f8E1M6FN", "f8E4M3FN", "f8E5M2",
)  # fmt: skip
assert set(ELEMENTS) < set(FORMATS)
LEVELS = [
    "",
    "@row:f32",
    "@tensor:f32",
    "@block32:f32",
    *(
        f"@{outer}block{width}:{scale}:{rounding}"
        for outer, (width, scale), rounding in itertools.product(
            ("", "row:f32/", "tensor:f32/"),
            ((16, "f8E4M3FN"), (32, "f8E8M0FNU"), (128, "f8E8M0FNU")),
            ("floor", "ceil", "rne", "mse"),
        )
    ),
]
INSTRUCTIONS = [
    pytest.param(
        index,
        id=name,
        marks=pytest.mark.skipif(
            LIBRARY is None or not LIBRARY.has(index), reason=f"no {name} on this processor"
        ),
    )
    for index, name in enumerate(INSTRUCTION_SETS)
]


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one instruction set."""
    assert LIBRARY is not None
    chosen = dataclasses.replace(LIBRARY, instructions=request.param)
    monkeypatch.setattr(scaling, "quantizer", lambda *_: chosen)


def in_pytorch(x: Tensor, operand: Operand, packed: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "quantizer", lambda *_: None)
        return (numerics.quantize_packed if packed else numerics.quantize)(x, operand)


def assert_same(x: Tensor, operand: Operand, packings: tuple[bool, ...] = (True,)) -> None:
    for packed in packings:
        codes, scales = (numerics.quantize_packed if packed else numerics.quantize)(x, operand)
        wanted, wanted_scales = in_pytorch(x, operand, packed)
        for part, other in zip((codes, *scales), (wanted, *wanted_scales), strict=True):
            assert part.dtype == other.dtype
            torch.testing.assert_close(part, other, rtol=0, atol=0, msg=f"{operand} {x.shape}")


def samples(shape: tuple[int, int]) -> list[Tensor]:
    """Return ordinary values, outliers, ties, both ends of the range, and short dtypes."""
    generator = torch.Generator().manual_seed(shape[1])
    x = torch.randn(shape, generator=generator)
    x[0] = 0.0
    wide = x * torch.exp(3 * torch.randn(shape, generator=generator))
    ties = (x * 8).round() / 4
    return [
        *(x, -wide, ties, x * 2.0**-130, (x * 2.0**126).clamp(-3e38, 3e38)),
        *(x.bfloat16(), (wide * 2.0**-16).half().clamp(-6e4, 6e4)),
    ]


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("levels", LEVELS)
def test_every_operand_gives_the_bits_of_pytorch(levels: str) -> None:
    for element in ELEMENTS:
        for x in (*samples((3, 70)), *samples((2, 256))):
            assert_same(x, Operand.parse(element + levels))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("spec", SIGNED, ids=str)
def test_every_number_of_every_format_and_what_lies_between(spec: FloatSpec) -> None:
    values = torch.tensor([v for v in spec.values if math.isfinite(v)]).unique()
    exact = torch.cat([values, (values[1:] + values[:-1]) / 2])
    infinity = torch.tensor(torch.inf)
    near = torch.cat([exact, exact.nextafter(infinity), exact.nextafter(-infinity)])[None]
    assert_same(near, Operand(spec), (True, False))
    for levels in ("@token:f32", "@block32:f8E8M0FNU", "@tensor:f32/block16:f8E4M3FN"):
        assert_same(torch.cat([near, near / 3]), Operand.parse(f"{spec}{levels}"))


class Operators(TorchDispatchMode):
    """Notes the operators of PyTorch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "element", ["f4E2M1FN", "f6E2M3FN", "f8E3M4", "f8E3M4FN", "f8E4M3FN", "f8E1M6FN", "f6E5M0FN"]
)
def test_tokens_are_quantized_in_one_call_without_work_in_pytorch(
    element: str, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    operand = Operand.parse(f"{element}@token:f32")
    with Operators() as ran:
        numerics.quantize_packed(x, operand)
    allocations = {"aten.empty", "aten.ones"}
    assert set(ran.seen) <= allocations | {"aten.detach", "aten.view", "aten.alias"}
    assert sum(name in allocations for name in ran.seen) == 2  # the codes and the scales
    assert_same(x, operand)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("instructions")
def test_every_value_of_a_short_dtype_is_widened_exactly(dtype: torch.dtype) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)[bits.view(dtype).isfinite()].view(-1, 4)
    assert_same(x, Operand.parse("f8E4M3FN@row:f32"))
    assert_same(x, Operand.parse("f8E5M2"))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
    st.sampled_from(LEVELS),
    st.sampled_from(ELEMENTS),
)
def test_any_row(values: list[float], levels: str, element: str) -> None:
    assert_same(torch.tensor([values]), Operand.parse(element + levels))


def test_rows_that_are_views(subtests: pytest.Subtests) -> None:
    x = torch.randn(24, 96)
    operand = Operand.parse("f4E2M1FN@row:f32/block32:f8E8M0FNU")
    views = {
        "columns": x[:, 3:67],
        "rows": x[::2],
        "transposed": x.t(),
        "three axes": x.view(2, 12, 96),
    }
    for name, view in views.items():
        with subtests.test(name):
            assert_same(view, operand, (True, False))


def test_threads_change_nothing() -> None:
    x = torch.randn(700, 512)
    operand = Operand.parse("f4E2M1FN@tensor:f32/block16:f8E4M3FN")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same(x, operand)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("levels", ["", "@tensor:f32", "@row:f32", "@block32:f8E8M0FNU"])
def test_what_is_not_finite_is_refused(bad: float, dtype: torch.dtype, levels: str) -> None:
    x = torch.randn(4, 40).to(dtype)
    x[2, 37] = bad
    with pytest.raises(NumericsError, match=r"layer 'up': input holds NaN/Inf"):
        numerics.quantize(x, Operand.parse("f4E2M1FN" + levels), layer="up")
