"""The fpc operators: against a dense product in fp64, as torch operators, and their memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fpcompiler.errors import FormatError, NumericsError
from fpcompiler.numerics import dequantize, pack, quantize, unpack
from fpcompiler.operand import Operand
from fpcompiler.runtime import fused, ops, reference

W4 = "f4E2M1FN@row:f32/block32:f8E8M0FNU"
WEIGHTS = (
    W4,
    "f4E2M1FN@row:f32",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    "f4E3M0FN@block128:f32",
    "f6E2M3FN@block32:f8E8M0FNU",
    "f6E3M2FN@tensor:f32",
    "f8E4M3FN@row:f32/block32:f8E8M0FNU",
    "f6E3M2FN",
)
ACTIVATIONS = (
    "",
    "f6E2M3FN@block32:f8E8M0FNU",
    "f6E2M3FN@token:f32",
    "f8E4M3FN@tensor:f32",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    "f8E5M2@token:f32/block32:f8E8M0FNU",
)


def packed(weight: Tensor, text: str) -> tuple[list[Tensor], Tensor]:
    """Return a weight as the operator takes it, and its values."""
    operand = Operand.parse(text)
    codes, scales = quantize(weight, operand)
    stored = [pack(codes, operand.format.storage_bits), *scales]
    return stored, dequantize(codes, scales, operand)


def quantized(x: Tensor, text: str) -> tuple[list[Tensor], Tensor]:
    if not text:
        return [x], x
    parts = torch.ops.fpc.quantize(x, text, "layer")
    return parts, torch.ops.fpc.dequantize(parts, text, torch.float32)


@pytest.mark.parametrize("k", [1, 31, 64, 100])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_linear_is_the_product_of_the_values(weight, activation, k):
    torch.manual_seed(k)
    stored, w = packed(torch.randn(24, k), weight)
    parts, x = quantized(torch.randn(2, 5, k) * 3, activation)
    bias = torch.randn(24)
    y = torch.ops.fpc.linear(parts, stored, bias, activation, weight, k, torch.float32, "l")
    exact = x.double() @ w.double().T + bias
    # Every product and sum is rounded once to fp32, and so are two scales and the bias.
    bound = (k + 4) * 2**-24 * (x.double().abs() @ w.double().abs().T + bias.abs()) + 1e-30
    assert y.shape == (2, 5, 24)
    assert y.is_contiguous()
    assert bool(((y - exact).abs() <= bound).all())


@pytest.mark.parametrize("rows", [1, 7, 8, 64])
def test_the_result_does_not_depend_on_how_the_weight_is_cut(rows, monkeypatch):
    """Codes per row and token are integers, so that their sums are exact in any order."""
    weight, activation = "f4E2M1FN@row:f32", "f6E2M3FN@token:f32"
    stored, _ = packed(torch.randn(50, 96), weight)
    parts, _ = quantized(torch.randn(9, 96), activation)

    def run() -> Tensor:
        return torch.ops.fpc.linear(parts, stored, None, activation, weight, 96, torch.float32, "")

    whole = run()
    monkeypatch.setattr(reference, "CHUNK_VALUES", rows * 96)
    assert torch.equal(run(), whole)


def test_the_outer_scales_multiply_the_finished_sum():
    weight, activation = "f4E2M1FN@row:f32", "f6E2M3FN@token:f32"
    (codes, scale), _ = packed(torch.randn(8, 32), weight)
    (xc, xs), _ = quantized(torch.randn(3, 32), activation)
    plain = Operand.parse("f4E2M1FN"), Operand.parse("f6E2M3FN")
    sums = dequantize(xc, (), plain[1]) @ dequantize(unpack(codes, 4, 32), (), plain[0]).T
    y = torch.ops.fpc.linear([xc, xs], [codes, scale], None, activation, weight, 32,
                             torch.float32, "")  # fmt: skip
    assert torch.equal(y, sums * xs * scale.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_is_rounded_once_to_its_dtype(dtype):
    stored, _ = packed(torch.randn(8, 64), W4)
    x = torch.randn(3, 64).to(dtype)
    bias = torch.randn(8)
    run = torch.ops.fpc.linear
    y = run([x], stored, bias, "", W4, 64, dtype, "")
    assert torch.equal(y, run([x.float()], stored, bias, "", W4, 64, torch.float32, "").to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
def test_an_activation_is_that_of_the_result_in_its_type(activation, dtype):
    stored, _ = packed(torch.randn(40, 64), W4)
    parts, _ = quantized(torch.randn(2, 3, 64), ACTIVATIONS[1])
    arguments = (parts, stored, torch.randn(40), ACTIVATIONS[1], W4, 64, dtype, "l")
    y = torch.ops.fpc.linear(*arguments)
    functions = {
        "silu": torch.ops.aten.silu,
        "relu": torch.ops.aten.relu,
        "gelu": torch.ops.aten.gelu,
        "gelu_tanh": lambda x: torch.ops.aten.gelu(x, approximate="tanh"),
    }
    result = torch.ops.fpc.linear(*arguments, activation)
    assert torch.equal(result, functions[activation](y))
    assert not torch.equal(result, y)
    assert torch.equal(torch.ops.fpc.linear(*arguments, ""), y)
    torch.library.opcheck(torch.ops.fpc.linear.default, (*arguments, activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["", "silu"])
def test_a_residual_is_added_to_the_result_in_its_type(activation, dtype):
    stored, _ = packed(torch.randn(40, 64), W4)
    parts, _ = quantized(torch.randn(2, 3, 64), ACTIVATIONS[1])
    arguments = (parts, stored, torch.randn(40), ACTIVATIONS[1], W4, 64, dtype, "l", activation)
    residual = torch.randn(40, 3, 2).to(dtype).permute(2, 1, 0)
    before = residual.clone()
    y, result = torch.ops.fpc.linear(*arguments), torch.ops.fpc.linear(*arguments, residual)
    assert torch.equal(result, residual + y)
    assert torch.equal(residual, before)
    torch.library.opcheck(torch.ops.fpc.linear.default, (*arguments, residual))


@pytest.mark.parametrize("residual", [torch.ones(1, 8), torch.ones(2, 8).half(), torch.ones(8)])
def test_a_residual_that_does_not_fit_is_refused_with_the_layer(residual):
    stored, _ = packed(torch.randn(8, 64), W4)
    arguments = [torch.ones(2, 64)], stored, None, "", W4, 64, torch.float32, "a.b", ""
    with pytest.raises(NumericsError, match=r"layer 'a\.b': a residual of .* cannot be added"):
        torch.ops.fpc.linear(*arguments, residual)


def test_an_activation_that_does_not_exist_is_refused_with_the_layer():
    stored, _ = packed(torch.randn(8, 64), W4)
    with pytest.raises(NumericsError, match=r"layer 'a\.b': there is no activation 'swish'"):
        torch.ops.fpc.linear([torch.ones(1, 64)], stored, None, "", W4, 64, torch.float32, "a.b",
                             "swish")  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,)])
@pytest.mark.parametrize("activation", ["", "f6E2M3FN@token:f32/block32:f8E8M0FNU"])
def test_any_number_of_leading_axes_and_none_of_rows(shape, activation):
    stored, w = packed(torch.randn(8, 64), W4)
    parts, x = quantized(torch.randn(shape), activation)
    y = torch.ops.fpc.linear(parts, stored, None, activation, W4, 64, torch.float32, "")
    assert y.shape == (*shape[:-1], 8)
    assert torch.allclose(y, x @ w.T, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_change_the_result():
    stored, _ = packed(torch.randn(8, 64), W4)
    arguments = ([torch.randn(3, 64)], stored, None, "", W4, 64, torch.float32, "")
    expected = torch.ops.fpc.linear(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.ops.fpc.linear(*arguments), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS[:2])
@pytest.mark.parametrize("weight", WEIGHTS[:3:2])
def test_the_operators_are_good_citizens_of_torch(weight, activation):
    stored, _ = packed(torch.randn(8, 40), weight)
    x = torch.randn(2, 3, 40)
    parts, _ = quantized(x, activation)
    arguments = (parts, stored, torch.randn(8), activation, weight, 40, torch.bfloat16, "l")
    torch.library.opcheck(torch.ops.fpc.linear.default, arguments)
    if activation:
        torch.library.opcheck(torch.ops.fpc.quantize.default, (x, activation, "l"))
        dequantized = (parts, activation, torch.bfloat16)
        torch.library.opcheck(torch.ops.fpc.dequantize.default, dequantized)


@pytest.mark.parametrize("target", ["f6E3M2FN@row:f32", "f4E2M1FN@row:f32/block32:f8E8M0FNU"])
def test_fold_is_a_good_citizen_of_torch(target):
    levels = target.partition("@")[2]
    (codes, *scales), _ = quantized(torch.randn(4, 64), f"f4E2M1FN@{levels}")
    powers = torch.tensor([1.0, 8.0]).repeat_interleave(32)
    arguments = (codes, scales, powers, f"f4E2M1FN@{levels}", target, 0)
    torch.library.opcheck(torch.ops.fpc.fold.default, arguments)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_pack_is_a_good_citizen_of_torch(bits):
    codes = torch.randint(0, 1 << bits, (3, 10), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.fpc.pack.default, (codes, bits))
    packed = torch.ops.fpc.pack(codes, bits)
    assert torch.equal(packed, pack(codes, bits))
    torch.library.opcheck(torch.ops.fpc.unpack.default, (packed, bits, 10))
    assert torch.equal(torch.ops.fpc.unpack(packed, bits, 10), codes)


class Quantized(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stored, _ = packed(torch.randn(8, 40), W4)
        for index, tensor in enumerate(stored):
            self.register_buffer(f"w{index}", tensor)

    def forward(self, x: Tensor) -> Tensor:
        text = ACTIVATIONS[1]
        parts = torch.ops.fpc.quantize(x, text, "l")
        w = [self.w0, self.w1, self.w2]
        return torch.ops.fpc.linear(parts, w, None, text, W4, 40, x.dtype, "l")


def test_export_and_compile_see_through_the_operators():
    model, x = Quantized(), torch.randn(4, 40)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for rows in (4, 1, 9):
        x = torch.randn(rows, 40)
        assert torch.equal(program.module()(x), model(x))
        assert torch.equal(compiled(x), model(x))


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operator gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else [result]
        self.size = max([self.size, *(t.nbytes for t in tensors if isinstance(t, Tensor))])
        return result


@pytest.mark.parametrize("weight", ["f4E2M1FN@row:f32", "f6E2M3FN@block32:f8E8M0FNU"])
def test_a_weight_is_never_expanded_as_a_whole(weight):
    n, k = 8192, 1024
    operand = Operand.parse(weight)
    size = k * operand.format.storage_bits // 8
    scales = [torch.ones(n, 1)] if operand.outer else [torch.full((n, k // 32), 127).byte()]
    stored = [torch.randint(0, 255, (n, size), dtype=torch.uint8), *scales]
    largest = LargestTensor()
    with largest:
        reference.linear([torch.ones(2, k)], stored, None, None, operand, k, torch.float32)
    chunk = 4 * reference.CHUNK_VALUES
    assert chunk <= largest.size <= 3 * chunk < 4 * n * k // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 32}, r"layer 'a': expected activations \[..., 32\] with 0 scales, got \[3, 64\]"),
        ({"x": [torch.ones(3, 64)] * 2}, r"with 0 scales, got \[3, 64\] with 1"),
        (
            {"w": [torch.zeros(8, 64, dtype=torch.uint8)]},
            r"expected a packed weight \[N, 32\] with 2",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    stored, _ = packed(torch.randn(8, 64), W4)
    arguments = {"x": [torch.ones(3, 64)], "w": stored, "k": 64, **change}
    x, w, k = arguments.values()
    with pytest.raises(NumericsError, match=message):
        torch.ops.fpc.linear(x, w, None, "", W4, k, torch.float32, "a")


def test_values_that_cannot_be_quantized_are_refused_with_the_layer():
    with pytest.raises(NumericsError, match=r"layer 'a\.b': input holds NaN/Inf"):
        torch.ops.fpc.quantize(torch.tensor([[float("nan")]]), "f4E2M1FN@row:f32", "a.b")
    with pytest.raises(FormatError, match="There is no format"):
        torch.ops.fpc.quantize(torch.ones(1, 1), "int4", "")


def test_scale_shapes_are_those_of_quantize():
    for text in (*WEIGHTS, *ACTIVATIONS[1:]):
        operand = Operand.parse(text)
        _, scales = quantize(torch.randn(3, 5, 70), operand)
        shapes = [ops.scale_shape((3, 5, 70), level) for level in operand.levels]
        assert shapes == [tuple(scale.shape) for scale in scales]
