"""Activations and residuals of native layers, on each instruction set, for types and shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fpcompiler
from fpcompiler.errors import NumericsError
from fpcompiler.native import library
from fpcompiler.native.linear import Arithmetic
from fpcompiler.numerics import quantize_packed
from fpcompiler.operand import Operand
from fpcompiler.runtime import fused
from fpcompiler.runtime.fused import ACTIVATIONS
from fpcompiler.runtime.native import NativeLinear
from fpcompiler.runtime.native_ops import TracedLinear
from fpcompiler.runtime.native_steps import NativeLayer
from tests.runtime.test_native import INPUTS, LEVELS, WEIGHTS, case, operand
from tests.runtime.test_native_producers import Case, layer, values_of

NATIVE = library()
pytestmark = pytest.mark.skipif(NATIVE is None, reason="the native library was not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [
    ("row", "a6"),  # integers without groups
    ("mx", "a6mx"),  # and with them
    ("mx8", "a8"),  # bytes; bf16 where there is, or else fp32
    ("e3m2", "none"),
]
SHAPES = [(1, 8, 1), (17, 40, 7), (64, 33, 6), (100, 64, 130), (130, 96, 113)]
"""Outputs, inputs, rows: parts of vectors and of blocks, one row, panels."""


def pair(
    n: int, k: int, kinds: tuple[str, str], dtype: torch.dtype, level: int, activation: str
) -> tuple[NativeLinear, NativeLinear, Tensor]:
    """Return a layer without and with an activation, and its weights."""
    weight = Operand.parse(WEIGHTS[kinds[0]])
    w, _ = case(n, k, 1)
    packed, scales = quantize_packed(w, weight)
    args = [packed, *scales], torch.linspace(-1, 1, n), operand(INPUTS[kinds[1]]), weight, k, dtype
    plain, own = (
        NativeLinear(*args, "up", level, activation=name) for name in ("", activation)
    )  # fmt: skip
    return plain, own, w


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_activation_of_the_stored_output(activation: str, kinds, level: int) -> None:
    """Bit for bit what a native fused quantizer computes of it, so within its bound of torch."""
    for n, k, m in SHAPES:
        for dtype in DTYPES:
            plain, own, _ = pair(n, k, kinds, dtype, level, activation)
            _, x = case(n, k, m, dtype)
            output, result = plain(x, dtype), own(x, dtype)
            given = Case(output, None, None, None, None, activation, 0.0)
            assert result.dtype == dtype
            assert torch.equal(result.float(), values_of(layer(n), given))
            error = (result.double() - fused.activate(output, activation).double()).abs()
            assert bool((error <= 6 * torch.finfo(dtype).eps * output.double().abs()).all())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("activation", ["", "relu"])
def test_a_residual_is_added_as_torch_does_it(activation: str, kinds, level: int) -> None:
    for n, k, m in SHAPES:
        for dtype in DTYPES:
            _, own, _ = pair(n, k, kinds, dtype, level, activation)
            _, x = case(n, k, m, dtype)
            residual = torch.linspace(-9, 9, m * n).view(n, m).T.to(dtype)  # with gaps
            prepared = own.prepare(x)
            result = own.multiply(prepared, dtype, residual)
            assert torch.equal(result, own.multiply(prepared, dtype) + residual)


def test_residuals_beyond_the_range_of_fp16_and_without_a_number() -> None:
    _, own, _ = pair(40, 64, ("row", "a6"), torch.float16, LEVELS[-1].values[0], "")
    prepared = own.prepare(torch.full((5, 64), 0.5).half())
    ends = torch.tensor([65504, -65504, 6e-8, -0.0, float("inf"), float("-inf"), float("nan"), 0])
    residual = ends.half().repeat(25).view(5, 40)
    expected = own.multiply(prepared, torch.float16) + residual
    found = own.multiply(prepared, torch.float16, residual)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("residual", [torch.ones(1, 40), torch.ones(5, 40).half()])
def test_a_residual_that_does_not_fit_is_refused(residual: Tensor) -> None:
    _, own, _ = pair(40, 64, ("row", "a6"), torch.float32, LEVELS[-1].values[0], "")
    with pytest.raises(NumericsError, match=r"layer 'up': a residual of .* cannot be added"):
        own.multiply(own.prepare(torch.ones(5, 64)), torch.float32, residual)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("m", [1, 5, 100])
def test_threads_that_share_a_product(m: int, level: int) -> None:
    """Few outputs and many inputs: blocks are cut into halves, and rows into runs."""
    before = torch.get_num_threads()
    _, x = case(90, 9000, m)
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            _, own, _ = pair(90, 9000, ("row", "a6"), torch.float32, level, "silu")
            results.append(own(x, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_without_a_number_are_those_of_torch(activation: str, level: int) -> None:
    """fp16 overflows to infinity, whose activation may be none."""
    plain, own, _ = pair(70, 64, ("row", "a6"), torch.float16, level, activation)
    x = torch.linspace(-6e4, 6e4, 5 * 64).view(5, 64).half()
    output = plain(x, torch.float16)
    assert bool(output.isinf().any())
    expected = fused.activate(output, activation)
    assert torch.allclose(own(x, torch.float16), expected, rtol=2e-3, equal_nan=True)


class Branches(nn.Module):
    """Activations whose results are multiplied, added, and read by a head in high precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.mix, self.lm_head = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x - functional.gelu(self.mix(x))
        x = x + self.down(functional.silu(self.gate(x)) * self.up(x))
        result: Tensor = self.lm_head(functional.relu(self.mix(x)))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["w4a16", "w4a6", "w4a6-row"])
def test_a_compiled_model_and_its_artifact(scheme: str, dtype: torch.dtype, tmp_path) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    model = Branches().eval().to(dtype)
    native = fpcompiler.compile(model, scheme, example_inputs=(x,))
    plain = fpcompiler.compile(model, scheme, example_inputs=(x,), target="reference")
    layers = [
        instruction.function.linear
        for instruction in native._ready()._code
        if isinstance(instruction.function, NativeLayer)
    ]
    wanted = {"w4a16": ["silu", "gelu", "relu"]}.get(scheme, ["gelu", "relu"])
    codes = sorted(tuple(fused.HEADS).index(name) for name in wanted)
    assert sorted(linear.structures[0].activation for linear in layers)[-len(wanted) :] == codes
    expected, result = plain(x), native(x)
    error = (result - expected).float().norm() / expected.float().norm()
    assert float(error) < (1e-5 if scheme == "w4a16" and dtype == torch.float32 else 0.03)
    native.save(tmp_path / "model.fpc")
    assert torch.equal(fpcompiler.load(tmp_path / "model.fpc")(x), result)


def test_an_activation_that_does_not_exist_is_refused_by_the_operator() -> None:
    _, own, _ = pair(8, 64, ("row", "none"), torch.float32, 0, "gelu")
    weight = WEIGHTS["row"]
    packed, scales = quantize_packed(torch.ones(8, 64), Operand.parse(weight))
    args = [torch.ones(1, 64)], [packed, *scales], None, "", weight, 64, torch.bfloat16, "up"
    bound = NativeLayer(own, torch.ops.fpc.linear, TracedLinear.of(own, "up"))
    assert own.kind.arithmetic is Arithmetic.FLOAT32
    with pytest.raises(NumericsError, match="layer 'up': there is no activation 'swish'"):
        bound(*args, "swish")  # other types than the layer's are the operator's
