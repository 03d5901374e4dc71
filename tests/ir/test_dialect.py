"""The verifiers of the fpq dialect: what they accept, and the exact words of what they refuse."""

from __future__ import annotations

import pytest

from fpcompiler import ir
from fpcompiler.errors import IRError
from fpcompiler.runtime.fused import ACTIVATIONS

F32 = "!torch.vtensor<[2,64],f32>"
W4 = '!fpq.quantized<tensor<8x64xf4E2M1FN>, "row:f32/block32:f8E8M0FNU">'
A6 = '!fpq.quantized<tensor<2x64xf6E2M3FN>, "block32:f8E8M0FNU">'
OUT = "!torch.vtensor<[2,8],f32>"
NONE = "!torch.none"


def program(op: str, operands: tuple[str, ...], result: str, attributes: str = "") -> str:
    """Return a module whose function is one operation on its arguments."""
    names = [f"%a{i}" for i in range(len(operands))]
    arguments = ", ".join(f"{n}: {t}" for n, t in zip(names, operands, strict=True))
    return f"""
    func.func @main({arguments}) -> {result} {{
      %r = "fpq.{op}"({", ".join(names)}) {attributes} : ({", ".join(operands)}) -> {result}
        loc("r"("model.layer"("net.py":12:0)))
      return %r : {result}
    }}"""


def linear(x: str = A6, w: str = W4, bias: str = NONE, result: str = OUT) -> str:
    return program("linear", (x, w, bias), result, '{layer = "fc"}')


K64 = "!torch.vtensor<[64],f32>"
ROWS = '!fpq.quantized<tensor<8x64xf4E2M1FN>, "row:f32">'
WIDE = '!fpq.quantized<tensor<8x64xf6E3M2FN>, "row:f32">'


def gemm(activation: str, result: str = OUT) -> str:
    attributes = f'layer = "fc", kernel = "reference", reason = "r", activation = {activation}'
    return program("scaled_gemm", (A6, W4, NONE), result, f"{{{attributes}}}")


def adding(residual: str, result: str = OUT) -> str:
    attributes = '{layer = "fc", kernel = "reference", reason = "r"}'
    return program("scaled_gemm_add", (A6, W4, NONE, residual), result, attributes)


def fold(before: str = ROWS, after: str = WIDE, powers: str = K64, shift: int = 0) -> str:
    return program("fold", (before, powers), after, f"{{shift = {shift} : i64}}")


PACKED = "!torch.vtensor<[8,32],ui8>"
ROW_SCALES, BLOCK_SCALES = "!torch.vtensor<[8,1],f32>", "!torch.vtensor<[8,2],ui8>"


def disassemble(*results: str, value: str = W4) -> str:
    """Return a module that takes a quantized value apart and gives back its codes."""
    return f"""
    func.func @main(%a: {value}) -> {results[0]} {{
      %r:3 = "fpq.disassemble"(%a) : ({value}) -> ({", ".join(results)})
        loc("r"("model.layer"("net.py":12:0)))
      return %r#0 : {results[0]}
    }}"""


ASSEMBLED = ("tensor<8x64xf4E2M1FN>", "tensor<8x1xf32>", "tensor<8x2xf8E8M0FNU>")

GOOD = {
    "quantize": program("quantize", (F32,), A6),
    "quantize-dynamic": program(
        "quantize",
        ("!torch.vtensor<[?,?,64],bf16>",),
        '!fpq.quantized<tensor<?x?x64xf6E2M3FN>, "token:f32">',
    ),
    "quantize-own-format": program(
        "quantize", (F32,), '!fpq.quantized<tensor<2x64x!fpq.float<"f4E1M2FN">>, "tensor:f32">'
    ),
    "quantize-no-scale": program("quantize", (F32,), '!fpq.quantized<tensor<2x64xf8E5M2>, "">'),
    "dequantize": program("dequantize", (A6,), F32),
    "assemble": program("assemble", ASSEMBLED, W4),
    "assemble-short-block": program(
        "assemble",
        ("tensor<8x65xf4E2M1FN>", NONE, "tensor<8x3xf8E8M0FNU>"),
        '!fpq.quantized<tensor<8x65xf4E2M1FN>, "block32:f8E8M0FNU">',
    ),
    "assemble-tensors": program("assemble", (PACKED, ROW_SCALES, BLOCK_SCALES), W4),
    "disassemble": disassemble(PACKED, ROW_SCALES, BLOCK_SCALES),
    "disassemble-six-bits": disassemble(
        "!torch.vtensor<[?,51],ui8>",
        "!torch.vtensor<[?,1],f32>",
        NONE,
        value='!fpq.quantized<tensor<?x65xf6E2M3FN>, "token:f32">',
    ),
    "fold": fold(),
    "fold-shifted": fold(shift=2),
    "fold-into-block-scales": fold(W4, W4),
    "linear": linear(),
    "linear-float-input": linear(x=F32),
    "linear-bias": linear(bias="!torch.vtensor<[8],f32>"),
    "scaled-gemm": program(
        "scaled_gemm",
        (A6, W4, NONE),
        OUT,
        '{layer = "fc", kernel = "reference", reason = "because"}',
    ),
    **{f"scaled-gemm-{name}": gemm(f'"{name}"') for name in ACTIVATIONS},
    "scaled-gemm-bf16": gemm('"gelu"', "!torch.vtensor<[2,8],bf16>"),
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD.keys())
def test_valid_operations_print_and_parse(text: str) -> None:
    parsed = ir.parse_program(text)
    parsed.verify()
    printed = ir.print_program(parsed)
    assert ir.print_program(ir.parse_program(printed)) == printed


def quantized(shape: str, element: str = "f6E2M3FN", levels: str = "block32:f8E8M0FNU") -> str:
    return f'!fpq.quantized<tensor<{shape}x{element}>, "{levels}">'


BAD = {
    "quantize-unranked": (
        program("quantize", ("!torch.vtensor",), A6),
        "'fpq.quantize' op input must be a ranked !torch.vtensor, not !torch.vtensor",
    ),
    "quantize-scalar": (
        program("quantize", ("!torch.vtensor<[],f32>",), '!fpq.quantized<tensor<f8E5M2>, "">'),
        "'fpq.quantize' op input has no axis to quantize along",
    ),
    "quantize-integers": (
        program("quantize", ("!torch.vtensor<[2,64],si64>",), A6),
        "'fpq.quantize' op input must hold floating-point values, not si64",
    ),
    "quantize-shape": (
        program("quantize", (F32,), quantized("2x32")),
        "'fpq.quantize' op result: shape [2, 32] is not [2, 64]",
    ),
    "quantize-rank": (
        program("quantize", (F32,), quantized("64")),
        "'fpq.quantize' op result: shape [64] is not [2, 64]",
    ),
    "quantize-blocks-of-unknown-axis": (
        program("quantize", ("!torch.vtensor<[2,?],f32>",), quantized("2x?")),
        "'fpq.quantize' op level block32:f8E8M0FNU needs a last axis of known size",
    ),
    "quantize-not-quantized": (
        program("quantize", (F32,), "!torch.int"),
        "'fpq.quantize' op result must be !fpq.quantized, not !torch.int",
    ),
    "quantize-level": (
        program("quantize", (F32,), quantized("2x64", levels="column:f32")),
        "'fpq.quantize' op 'column:f32' is no scale level; write for instance row:f32 or "
        "block32:f8E8M0FNU.",
    ),
    "quantize-block-size": (
        program("quantize", (F32,), quantized("2x64", levels="block24:f8E8M0FNU")),
        "'fpq.quantize' op a block of 24 values is not possible; sizes: 16, 32, 64, 128.",
    ),
    "quantize-unsigned-format": (
        program("quantize", (F32,), quantized("2x64", "f8E8M0FNU", "")),
        "'fpq.quantize' op f8E8M0FNU has no sign and cannot hold elements, only scales.",
    ),
    "quantize-order-of-levels": (
        program("quantize", (F32,), quantized("2x64", levels="block32:f8E8M0FNU/token:f32")),
        "'fpq.quantize' op the levels block32:f8E8M0FNU/token:f32 cannot be combined: at most one "
        "per tensor, row or token, and then one per block.",
    ),
    "dequantize-shape": (
        program("dequantize", (A6,), "!torch.vtensor<[3,64],f32>"),
        "'fpq.dequantize' op result: shape [3, 64] is not [2, 64]",
    ),
    "assemble-codes": (
        program("assemble", ("tensor<8x32xf4E2M1FN>", *ASSEMBLED[1:]), W4),
        "'fpq.assemble' op operands tensor<8x32xf4E2M1FN>, tensor<8x1xf32>, tensor<8x2xf8E8M0FNU> "
        "are not tensor<8x64xf4E2M1FN>, tensor<8x1xf32>, tensor<8x2xf8E8M0FNU>",
    ),
    "assemble-missing-scale": (
        program("assemble", (ASSEMBLED[0], NONE, ASSEMBLED[2]), W4),
        "'fpq.assemble' op operands tensor<8x64xf4E2M1FN>, !torch.none, tensor<8x2xf8E8M0FNU> "
        "are not tensor<8x64xf4E2M1FN>, tensor<8x1xf32>, tensor<8x2xf8E8M0FNU>",
    ),
    "assemble-unpacked": (
        program("assemble", ("!torch.vtensor<[8,64],ui8>", ROW_SCALES, BLOCK_SCALES), W4),
        f"'fpq.assemble' op operands !torch.vtensor<[8,64],ui8>, {ROW_SCALES}, {BLOCK_SCALES} "
        f"are not {PACKED}, {ROW_SCALES}, {BLOCK_SCALES}",
    ),
    "disassemble-scales": (
        disassemble(PACKED, ROW_SCALES, NONE),
        f"'fpq.disassemble' op results {PACKED}, {ROW_SCALES}, !torch.none are not "
        f"{PACKED}, {ROW_SCALES}, {BLOCK_SCALES}",
    ),
    "disassemble-unknown-axis": (
        disassemble(PACKED, NONE, NONE, value='!fpq.quantized<tensor<8x?xf4E2M1FN>, "">'),
        "'fpq.disassemble' op packed codes need a last axis of known size",
    ),
    "fold-powers": (
        fold(powers="!torch.vtensor<[32],f32>"),
        "'fpq.fold' op powers: shape [32] is not [64]",
    ),
    "fold-levels": (
        fold(after='!fpq.quantized<tensor<8x64xf6E3M2FN>, "tensor:f32">'),
        "'fpq.fold' op the scale levels of f4E2M1FN@row:f32 and f6E3M2FN@tensor:f32 differ, or "
        "there are none",
    ),
    "fold-no-block-scales": (
        fold(after=ROWS),
        "'fpq.fold' op the scales of f4E2M1FN@row:f32 cannot take powers of two",
    ),
    "fold-narrower": (
        fold(WIDE, ROWS),
        "'fpq.fold' op f4E2M1FN does not hold f6E3M2FN times 2**0",
    ),
    "fold-out-of-range": (
        fold(shift=3),
        "'fpq.fold' op f6E3M2FN does not hold f4E2M1FN times 2**3",
    ),
    "linear-float-weight": (
        linear(w="!torch.vtensor<[8,64],f32>"),
        "'fpq.linear' op weight must be !fpq.quantized, not !torch.vtensor<[8,64],f32>",
    ),
    "linear-weight-rank": (
        linear(w=quantized("2x8x64", "f4E2M1FN")),
        "'fpq.linear' op weight must be [N, K] with known sizes, not [2, 8, 64]",
    ),
    "linear-weight-unknown": (
        linear(w=quantized("?x64", "f4E2M1FN")),
        "'fpq.linear' op weight must be [N, K] with known sizes, not [?, 64]",
    ),
    "linear-contracted-axis": (
        linear(x=quantized("2x32")),
        "'fpq.linear' op the contracted axes differ: input [2, 32], weight [8, 64]",
    ),
    "linear-result": (
        linear(result="!torch.vtensor<[2,9],f32>"),
        "'fpq.linear' op result: shape [2, 9] is not [2, 8]",
    ),
    "linear-bias": (
        linear(bias="!torch.vtensor<[9],f32>"),
        "'fpq.linear' op bias: shape [9] is not [8]",
    ),
    "linear-row-scales-of-input": (
        linear(x=quantized("2x64", levels="row:f32")),
        "'fpq.linear' op input cannot have a scale per row: f6E2M3FN@row:f32",
    ),
    "linear-token-scales-of-weight": (
        linear(w=quantized("8x64", "f4E2M1FN", "token:f32")),
        "'fpq.linear' op weight cannot have a scale per token: f4E2M1FN@token:f32",
    ),
    "gemm-contracted-axis": (
        program(
            "scaled_gemm",
            (quantized("2x32"), W4, NONE),
            OUT,
            '{layer = "fc", kernel = "reference", reason = "because"}',
        ),
        "'fpq.scaled_gemm' op the contracted axes differ: input [2, 32], weight [8, 64]",
    ),
    "gemm-unknown-activation": (
        gemm('"swish"'),
        "'fpq.scaled_gemm' op there is no activation \"swish\"; there are silu, gelu, gelu_tanh, "
        "relu",
    ),
    "gemm-activation-that-is-no-text": (
        gemm("1 : i64"),
        "'fpq.scaled_gemm' op there is no activation 1 : i64; there are silu, gelu, gelu_tanh, "
        "relu",
    ),
    "gemm-activation-that-is-a-norm": (
        gemm('"rms_norm"'),
        "'fpq.scaled_gemm' op there is no activation \"rms_norm\"; there are silu, gelu, "
        "gelu_tanh, relu",
    ),
    "gemm-activation-of-fp64": (
        gemm('"gelu"', "!torch.vtensor<[2,8],f64>"),
        "'fpq.scaled_gemm' op an activation is computed of f32, f16, bf16, not f64",
    ),
    "gemm-residual-of-another-shape": (
        adding("!torch.vtensor<[1,8],f32>"),
        "'fpq.scaled_gemm_add' op residual: shape [1, 8] is not [2, 8]",
    ),
    "gemm-residual-of-another-type": (
        adding("!torch.vtensor<[2,8],bf16>"),
        "'fpq.scaled_gemm_add' op a residual of bf16 cannot be added to f32; both must be one of "
        "f32, f16, bf16",
    ),
    "gemm-residual-of-fp64": (
        adding("!torch.vtensor<[2,8],f64>", "!torch.vtensor<[2,8],f64>"),
        "'fpq.scaled_gemm_add' op a residual of f64 cannot be added to f64; both must be one of "
        "f32, f16, bf16",
    ),
    "gemm-residual-that-is-no-tensor": (
        adding(NONE),
        "'fpq.scaled_gemm_add' op residual must be a ranked !torch.vtensor, not !torch.none",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_malformed_operations_are_refused_with_their_place(text: str, message: str) -> None:
    with pytest.raises(IRError) as caught:
        ir.parse_program(text)
    lines = str(caught.value).splitlines()
    assert lines[1:2] == [f'  "r"("model.layer"("net.py":12:0)): {message}']


def test_a_layer_without_its_name_is_refused() -> None:
    with pytest.raises(IRError, match='attribute "layer" is expected but not provided'):
        ir.parse_program(program("linear", (A6, W4, NONE), OUT))


def test_text_that_is_no_mlir_and_a_module_without_main() -> None:
    with pytest.raises(IRError, match="Unable to parse module"):
        ir.parse_program("this is no program")
    with pytest.raises(IRError, match="the module has no function"):
        _ = ir.parse_program("module {}").function


def test_an_unknown_stage_is_refused() -> None:
    program = ir.parse_program('module attributes {fpq.stage = "cooked"} {}')
    with pytest.raises(IRError) as caught:
        _ = program.stage
    assert str(caught.value) == (
        "the module says it is at stage 'cooked'; stages: captured, normalized, quantized, lowered."
    )
