"""Fused quantizers in the native library against torch, on each instruction set."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fpcompiler
from fpcompiler.errors import NumericsError
from fpcompiler.native import INSTRUCTION_SETS, library
from fpcompiler.numerics import quantize, quantize_packed
from fpcompiler.operand import Operand
from fpcompiler.runtime.fused import HEADS, PRODUCERS, SLOTS, TAILS, produce
from fpcompiler.runtime.native import NativeLinear
from fpcompiler.runtime.native_producers import _place, describe
from fpcompiler.runtime.native_steps import NativeQuantizer

NATIVE = library()
pytestmark = pytest.mark.skipif(NATIVE is None, reason="the native library was not built")

LEVELS = [
    level for level in range(len(INSTRUCTION_SETS)) if NATIVE and level <= NATIVE.instructions
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT = Operand.parse("e2m1@row:f32")
OPERANDS = (
    "e2m3@block32:e8m0",
    "e2m3@token:f32",
    "e2m1@token:f32/block32:e8m0",
    "e2m1@tensor:f32/block16:e4m3",
    "e4m3@block128:e8m0",
)
EPS = 1e-5


class Case(NamedTuple):
    """The arguments of ``produce``."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    producer: str
    eps: float


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(producer: str, rows: int, channels: int, dtype: torch.dtype) -> Case:
    """Return outliers in some channels, and for tails values that all rows share."""
    found = PRODUCERS[producer]
    values = {
        "weight": 1 + normal(channels, seed=3),
        "bias": normal(channels, seed=4),
        "scale": normal(channels, seed=5),
        "shift": normal(channels, seed=6),
    }
    read = {*HEADS[found.head], *TAILS[found.tail][0], *TAILS[found.tail][1]}
    x = normal(rows, channels, seed=rows) * normal(channels, seed=2).mul(2).exp()
    slots = [values[name].to(dtype) if name in read else None for name in SLOTS]
    return Case(x.to(dtype), *slots, producer, EPS)


def layer(channels: int, inputs: str = "", level: int | None = None, n: int = 3) -> NativeLinear:
    packed, scales = quantize_packed(normal(n, channels, seed=1), WEIGHT)
    operand = Operand.parse(inputs) if inputs else None
    return NativeLinear(
        [packed, *scales], None, operand, WEIGHT, channels, torch.float32, "up", level
    )


def values_of(linear: NativeLinear, given: Case) -> Tensor:
    """Return what the library computes; a layer of fp32 inputs has it in rows (csrc/layout.h)."""
    produced = describe(*given)
    assert produced is not None
    prepared = linear.prepare_produced(produced)
    bytes_of_row = -(-linear.kind.k * 4 // 64) * 64 + 64
    start = prepared.address - prepared.memory.data_ptr()
    rows = prepared.memory[start : start + prepared.rows * bytes_of_row]
    return rows.view(torch.float32).view(prepared.rows, -1)[:, : linear.kind.k].clone()


def variance(x: Tensor, centred: bool) -> Tensor:
    centre = x.mean(-1, keepdim=True) if centred else 0
    return (x - centre).square().mean(-1, keepdim=True)


def magnitude(given: Case) -> Tensor:
    """Return the sum of the magnitudes of the terms of each result, which errors are relative to.

    A mean has an error of the magnitude of what is summed.
    """
    x = given.x.double().flatten(0, -2)
    one, zero = torch.ones(1), torch.zeros(1)
    weight, bias, scale, shift = (
        given[index] if given[index] is not None else (one if index in (1, 3) else zero)
        for index in range(1, 5)
    )
    head = x.abs()
    if "norm" in given.producer:
        centred = given.producer.startswith("layer")
        root = (variance(x, centred) + given.eps).sqrt()
        terms = x.abs() + (x.abs().mean(-1, keepdim=True) if centred else 0)
        head = terms / root * weight.abs().double() + bias.abs().double()
    factor = scale.double().abs() + (1 if given.producer.endswith("modulate") else 0)
    return head * factor + shift.double().abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 7, 64, 100, 576, 1152, 4097])
def test_values_are_those_of_torch_and_the_same_on_all_instruction_sets(channels, dtype) -> None:
    layers = [layer(channels, level=level) for level in LEVELS]
    for producer in PRODUCERS:
        for rows in (1, 5, 33):
            given = case(producer, rows, channels, dtype)
            result, *others = (values_of(linear, given) for linear in layers)
            expected = produce(*given)
            assert all(torch.equal(other, result) for other in others)
            error = (result.double() - expected.double()).abs()
            assert bool((error <= 6 * torch.finfo(dtype).eps * magnitude(given)).all())
            if dtype != torch.float32 and channels >= 64:
                assert float((error == 0).double().mean()) > 0.97


@pytest.mark.parametrize("channels", [7, 576, 4097])
@pytest.mark.parametrize("producer", ["rms_norm", "rms_norm_wide", "layer_norm"])
def test_norms_are_within_a_few_roundings_of_fp64(producer: str, channels: int) -> None:
    given = case(producer, 33, channels, torch.float32)
    assert given.weight is not None
    x, weight, centred = given.x.double(), given.weight.double(), producer == "layer_norm"
    root = (variance(x, centred) + given.eps).sqrt()
    centre = x.mean(-1, keepdim=True) if centred else torch.zeros(1)
    bias = torch.zeros(1) if given.bias is None else given.bias.double()
    expected = (x - centre) / root * weight + bias
    terms = (x.abs() + 2 * centre.abs()) / root * weight.abs() + bias.abs()
    error = (values_of(layer(channels), given).double() - expected).abs()
    assert bool((error <= 3 * torch.finfo(torch.float32).eps * terms).all())


MIXED = [
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float32, torch.bfloat16),
    (torch.float16, torch.float16, torch.bfloat16),
    (torch.float32, torch.float32, torch.float16),
]


@pytest.mark.parametrize("types", MIXED, ids=str)
def test_mixed_types_are_rounded_where_torch_rounds(types) -> None:
    dtype, norm, tail = types
    linear = layer(192)
    for producer in PRODUCERS:
        plain = case(producer, 9, 192, dtype)
        vectors = [None if t is None else t.to(norm) for t in plain[1:3]]
        rows = [None if t is None else t.to(tail) for t in plain[3:5]]
        given = Case(plain.x, *vectors, *rows, producer, EPS)
        result, expected = values_of(linear, given), produce(*given)
        # Of fp32 results most are equal only where the heads round to 16 bits.
        close = torch.isclose(result, expected.float(), rtol=1e-5, atol=1e-6)
        assert float(close.double().mean()) > 0.97
        if expected.dtype != torch.float32:
            assert torch.equal(result, result.to(expected.dtype).float())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("operand", OPERANDS)
def test_values_are_quantized_as_if_they_had_been_stored(operand: str, level: int) -> None:
    for channels in (100, 256):
        linear, plain = layer(channels, operand, level, n=70), layer(channels)
        for producer in ("rms_norm", "layer_norm_modulate", "silu_mul", "gelu", "relu_add"):
            given = case(producer, 5, channels, torch.bfloat16)
            produced = describe(*given)
            assert produced is not None
            result = linear.multiply(linear.prepare_produced(produced), torch.float32)
            assert torch.equal(result, linear(values_of(plain, given), torch.float32))


@pytest.mark.parametrize("producer", ["rms_norm", "layer_norm_modulate", "silu_mul", "gelu_tanh"])
def test_few_codes_differ_from_the_reference(producer: str) -> None:
    given = case(producer, 64, 576, torch.float32)
    ours, theirs = values_of(layer(576), given), produce(*given)
    operand = Operand.parse(OPERANDS[0])
    (codes, _), (expected, _) = quantize(ours, operand), quantize(theirs, operand)
    assert float((codes != expected).double().mean()) < 1e-3


def views(batch: int, tokens: int, channels: int) -> dict[str, Tensor]:
    """Return what adaLN and gated units read: parts of larger tensors."""
    both = normal(batch, tokens, 2 * channels, seed=8)
    return {
        "channels": normal(2 * channels, seed=9)[channels:],
        "batch": normal(batch, 6 * channels, seed=10).unsqueeze(1)[..., channels : 2 * channels],
        "one": normal(1, 1, channels, seed=11),
        "half": both[..., channels:],
        "expanded": normal(batch, 1, channels, seed=12).expand(batch, tokens, channels),
        "every other token": normal(batch, 2 * tokens, channels, seed=13)[:, ::2],
    }


@pytest.mark.parametrize("name", views(1, 1, 1))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_are_read_where_they_are(name: str, dtype: torch.dtype) -> None:
    batch, tokens, channels = 3, 5, 72
    operand = views(batch, tokens, channels)[name].to(dtype)
    x = normal(batch, tokens, 2 * channels, seed=7).to(dtype)
    linear = layer(channels)
    for source in (x[..., :channels], x[..., channels:].contiguous(), x[:, :1, :channels]):
        fits = (
            operand
            if operand.dim() == 1 or operand.shape[1] == 1
            else operand[:, : source.shape[1]]
        )
        given = Case(source, None, None, fits, fits, "layer_norm_modulate", EPS)
        stored = fits.expand(source.shape).contiguous()
        plain = Case(source.contiguous(), None, None, stored, stored, "layer_norm_modulate", EPS)
        produced = describe(*given)
        assert produced is not None
        assert produced.x.data_ptr() == source.data_ptr()
        assert torch.equal(values_of(linear, given), values_of(linear, plain))


def test_threads_share_rows_out() -> None:
    channels = 512
    linear = layer(channels, OPERANDS[0])
    x, row = normal(6, 100, channels, seed=1), normal(6, 1, channels, seed=2)
    given = describe(x, None, None, row, row, "layer_norm_modulate", EPS)
    assert given is not None
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(linear.multiply(linear.prepare_produced(given), torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("head", HEADS)
def test_what_is_not_finite_is_refused_as_by_the_reference(head: str, value: float) -> None:
    for dtype in DTYPES:
        given = case(head, 5, 100, dtype)
        given.x[3, 98] = value
        produced = describe(*given)
        assert produced is not None
        for operand in (OPERANDS[0], OPERANDS[3]):
            linear = layer(100, operand)
            if bool(produce(*given).isfinite().all()):
                assert (head, value) == ("relu", -math.inf)
                linear.prepare_produced(produced)
                continue
            with pytest.raises(NumericsError, match="layer 'gate': input holds NaN/Inf"):
                linear.prepare_produced(produced, "gate")


def test_overflow_of_half_precision_is_refused() -> None:
    x = torch.full((1, 64), 300.0, dtype=torch.float16)
    produced = describe(x, None, None, x, None, "silu_mul", 0.0)
    assert produced is not None
    with pytest.raises(NumericsError, match="holds NaN/Inf"):
        layer(64, OPERANDS[0]).prepare_produced(produced)


def left_to_torch() -> dict[str, Case]:
    x, wide = normal(2, 3, 64, seed=1), normal(64, seed=2)
    return {
        "a scale for each token": Case(x, None, None, normal(3, 64, seed=3), None, "silu_mul", EPS),
        "fp64": Case(x, wide.double(), None, None, None, "rms_norm", EPS),
        "a weight of one row": Case(x, wide[None], None, None, None, "rms_norm", EPS),
        "one scale": Case(x, None, None, torch.tensor(2.0), None, "relu_mul", EPS),
        "a stride of channels": Case(x, None, None, wide.new_ones(128)[::2], None, "gelu_mul", EPS),
    }


@pytest.mark.parametrize("name", left_to_torch())
def test_other_tensors_are_left_to_torch(name: str) -> None:
    given = left_to_torch()[name]
    assert describe(*given) is None
    linear = layer(64, OPERANDS[0])
    quantizer = NativeQuantizer(linear, torch.ops.fpc.fused_quantize, 1)
    prepared, scales = quantizer(*given, OPERANDS[0], "up")
    assert scales is None
    expected = linear(produce(*given).float(), torch.float32)
    assert torch.equal(linear.multiply(prepared, torch.float32), expected)


def test_errors_are_those_of_the_reference() -> None:
    x, weight = normal(2, 64, seed=1), normal(64, seed=2)
    quantizer = NativeQuantizer(layer(64, OPERANDS[0]), torch.ops.fpc.fused_quantize, 1)
    with pytest.raises(NumericsError, match="layer 'up': silu_mul needs a scale"):
        quantizer(x, None, None, None, None, "silu_mul", 0.0, OPERANDS[0], "up")
    with pytest.raises(NumericsError, match="there is no producer 'swish'"):
        quantizer(x, None, None, None, None, "swish", 0.0, OPERANDS[0], "up")
    with pytest.raises(RuntimeError, match="mixed dtype"):
        quantizer(x, weight.half(), None, None, None, "layer_norm", EPS, OPERANDS[0], "up")


class Gated(nn.Module):
    """An RMSNorm and a gated unit, as in LLaMA."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(64)
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        result: Tensor = x + self.down(functional.silu(self.gate(h)) * self.up(h))
        return result


def test_a_compiled_model_computes_its_quantized_values_natively(monkeypatch) -> None:
    x = normal(5, 64, seed=1)
    native = fpcompiler.compile(Gated().eval(), "w4a6", example_inputs=(x,))
    plain = fpcompiler.compile(Gated().eval(), "w4a6", example_inputs=(x,), target="reference")
    functions = [instruction.function for instruction in native._ready()._code]
    assert sum(isinstance(function, NativeQuantizer) for function in functions) == 2
    expected = plain(x)
    monkeypatch.setattr("fpcompiler.runtime.fused.produce", None)
    assert torch.allclose(native(x), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=200)
@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    shared=st.lists(st.booleans(), min_size=3, max_size=3),
    dropped=st.integers(0, 3),
    order=st.permutations(range(3)),
)
def test_rows_are_where_a_place_says(lead, shared, dropped, order) -> None:
    """Views with any order of their axes, broadcast over any of them."""
    own = [1 if one else size for one, size in zip(shared, lead, strict=False)]
    axes = [axis for axis in order if axis < len(own)]
    memory = torch.arange(math.prod(own) * 4).view(*[own[axis] for axis in axes], 4)
    tensor = memory.permute(*[axes.index(axis) for axis in range(len(own))], len(own))
    while dropped and tensor.dim() > 1 and tensor.shape[0] == 1:
        tensor, dropped = tensor[0], dropped - 1
    to = (*lead, 4)
    place = _place(tensor.shape, tensor.stride(), to)
    if tensor.is_contiguous() and tensor.shape == to:
        assert place is not None
    if place is None:
        return
    repeat, stride = place
    starts = torch.arange(math.prod(lead)) // repeat * stride
    assert torch.equal(tensor.expand(to).reshape(-1, 4)[:, 0], starts)
