"""fpc::encode and fpc::hadamard as torch operators, and as they read in a program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fpcompiler import ir
from fpcompiler.errors import IRError, NumericsError
from fpcompiler.numerics import quantize
from fpcompiler.numerics.hadamard import hadamard
from fpcompiler.operand import Operand
from tests.models import normal
from tests.programs import evaluate

OPERANDS = [
    "f6E2M3FN@tensor:f32",
    "f4E2M1FN@row:f32/block32:f8E8M0FNU",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    "f8E5M2",
]


@pytest.mark.parametrize("text", OPERANDS)
def test_encode_is_a_good_citizen_of_torch(text: str) -> None:
    x = normal(2, 3, 40)
    codes, scales = quantize(x, Operand.parse(text))
    arguments = (x, list(scales), text, "l")
    torch.library.opcheck(torch.ops.fpc.encode.default, arguments)
    assert torch.equal(torch.ops.fpc.encode(*arguments), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64)])
def test_hadamard_is_a_good_citizen_of_torch(shape, dtype: torch.dtype) -> None:
    x = normal(*shape).to(dtype)
    torch.library.opcheck(torch.ops.fpc.hadamard.default, (x, 32))
    y = torch.ops.fpc.hadamard(x, 32)
    assert y.dtype == dtype
    assert torch.equal(y, hadamard(x, 32))


def test_hadamard_takes_values_that_are_not_contiguous() -> None:
    x = normal(64, 5, 2)
    torch.library.opcheck(torch.ops.fpc.hadamard.default, (x.transpose(0, 2), 16))
    expected = hadamard(x.transpose(0, 2).contiguous(), 16)
    assert torch.equal(torch.ops.fpc.hadamard(x.transpose(0, 2), 16), expected)


class Encoded(nn.Module):
    """An input that is transformed and encoded with a scale in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([[0.25]]))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.fpc.hadamard(x, 16)
        codes = torch.ops.fpc.encode(y, [self.scale], OPERANDS[0], "l")
        return torch.ops.fpc.dequantize([codes, self.scale], OPERANDS[0], x.dtype)


def test_export_and_compile_see_through_them() -> None:
    model, x = Encoded(), normal(4, 48)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for rows in (4, 1, 9):
        x = normal(rows, 48, seed=rows)
        assert torch.equal(program.module()(x), model(x))
        assert torch.equal(compiled(x), model(x))
        assert float(model(x).abs().max()) <= 7.5 * 0.25


def test_what_they_cannot_take_is_refused() -> None:
    bad = torch.full((1, 4), torch.nan)
    with pytest.raises(NumericsError, match=r"layer 'a\.b': input holds NaN/Inf"):
        torch.ops.fpc.encode(bad, [torch.ones(1, 1)], OPERANDS[0], "a.b")
    with pytest.raises(NumericsError, match="f6E2M3FN@tensor:f32 has 1 scales, not 0"):
        torch.ops.fpc.encode(torch.ones(1, 4), [], OPERANDS[0], "")
    with pytest.raises(NumericsError, match="no multiple of the Hadamard block of 32; use a block"):
        torch.ops.fpc.hadamard(torch.ones(1, 48), 32)


PROGRAM = """
module {
  ml_program.global private @scale(#ml_program.extern<tensor<1x1xf32>>) : tensor<1x1xf32>
  func.func @main(%x: !torch.vtensor<[?,64],f32>) -> !torch.vtensor<[?,64],f32> {
    %scale = ml_program.global_load @scale : tensor<1x1xf32>
    %none = torch.constant.none
    %h = "fpq.hadamard"(%x) {block = 64 : i64}
      : (!torch.vtensor<[?,64],f32>) -> !torch.vtensor<[?,64],f32>
    %q = "fpq.encode"(%h, %scale, %none) : (!torch.vtensor<[?,64],f32>, tensor<1x1xf32>,
      !torch.none) -> !fpq.quantized<tensor<?x64xf6E2M3FN>, "tensor:f32">
    %y = "fpq.dequantize"(%q) : (!fpq.quantized<tensor<?x64xf6E2M3FN>, "tensor:f32">)
      -> !torch.vtensor<[?,64],f32>
    return %y : !torch.vtensor<[?,64],f32>
  }
}
"""


def test_they_print_parse_and_run() -> None:
    program = ir.parse_program(PROGRAM, ir.Weights({"scale": torch.tensor([[0.5]])}))
    text = ir.print_program(program, locations=False)
    assert '"fpq.hadamard"(%arg0) {block = 64 : i64}' in text
    assert ir.print_program(ir.parse_program(ir.print_program(program))) == ir.print_program(
        program
    )
    for rows in (1, 3):
        x = normal(rows, 64, seed=rows)
        (y,) = evaluate(program, x)
        nearest = hadamard(x, 64).clamp(-3.75, 3.75)
        assert float((y - nearest).abs().max()) <= 0.125
        assert torch.equal(y, (y * 16).round() / 16)


BAD = {
    "block = 64": ("block = 24", "blocks of 24 do not fit an input [?, 64]"),
    "tensor<1x1xf32>": ("tensor<1x2xf32>", "scales tensor<1x2xf32>, !torch.none are not"),
    '"tensor:f32"': ('"token:f32"', "scales tensor<1x1xf32>, !torch.none are not tensor<?x1xf32>"),
    "tensor<?x64xf6E2M3FN>": ("tensor<?x32xf6E2M3FN>", "result: shape [?, 32] is not [?, 64]"),
}


@pytest.mark.parametrize("old", BAD)
def test_what_does_not_fit_is_refused(old: str) -> None:
    new, message = BAD[old]
    with pytest.raises(IRError) as caught:
        ir.parse_program(PROGRAM.replace(old, new))
    assert message in str(caught.value)


def test_blocks_must_fit_the_last_axis() -> None:
    with pytest.raises(IRError, match=r"blocks of 64 do not fit an input \[\?, 96\]"):
        ir.parse_program(PROGRAM.replace("[?,64]", "[?,96]").replace("x64x", "x96x"))
