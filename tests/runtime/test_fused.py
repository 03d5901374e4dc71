"""The fused quantizer: the bits of the single operations, for every producer, type and scheme."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fpcompiler.runtime.ops  # noqa: F401  (registers torch.ops.fpc)
from fpcompiler.errors import NumericsError
from fpcompiler.runtime.fused import HEADS, PRODUCERS, SLOTS, TAILS, Producer, produce
from tests.models import normal

B, T, C = 2, 5, 80
EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERANDS = (
    "f6E2M3FN@block32:f8E8M0FNU",
    "f8E4M3FN@token:f32",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    "f4E2M1FN@token:f32/block32:f8E8M0FNU",
    "f8E5M2",
)


class LlamaNorm(nn.Module):
    """The RMSNorm of transformers' LLaMA, line by line."""

    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + EPS)
        hidden_states = hidden_states.to(input_dtype)
        return hidden_states if self.weight is None else self.weight * hidden_states


class GemmaNorm(nn.Module):
    """The RMSNorm of transformers' Gemma, ``1 + weight`` computed before."""

    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        output = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        if self.weight is not None:
            output = output * self.weight.float()
        return output.type_as(x)


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a producer may read: outliers, views with strides, one value per channel."""
    x = normal(B, T, C) * torch.exp(2 * normal(C, seed=1))
    x[0, 0] = 0.0
    both = normal(B, 1, 2 * C, seed=2)
    values = {
        "x": x,
        "weight": 1 + normal(C, seed=3),
        "bias": normal(C, seed=4),
        "scale": both[..., :C],
        "shift": both[..., C:],
    }
    return {name: value.to(dtype) for name, value in values.items()}


def head(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return what a model computes, in the words of a model."""
    norms = {"rms_norm": LlamaNorm, "rms_norm_wide": GemmaNorm}
    if name in norms:
        return norms[name](weight)(x)
    if name == "layer_norm":
        return functional.layer_norm(x, (C,), weight, bias, EPS)
    if name == "gelu_tanh":
        return nn.GELU(approximate="tanh")(x)
    return {"silu": nn.SiLU(), "gelu": nn.GELU(), "relu": nn.ReLU()}[name](x)


def tail(name: str, h: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if name == "mul":
        return h * scale
    if name == "add":
        return h + shift
    if name == "modulate":
        h = h * (1 + scale)
        return h if shift is None else h + shift
    return h


def cases() -> list[tuple[Producer, tuple[str, ...]]]:
    """Return every producer with what it must read, and with all that it may read."""
    found = []
    for producer in PRODUCERS.values():
        needed, optional = TAILS[producer.tail]
        least, most = needed, (*HEADS[producer.head], *needed, *optional)
        found += [(producer, slots) for slots in dict.fromkeys((least, most))]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("producer", "slots"), cases(), ids=lambda value: str(value))
def test_codes_and_scales_are_those_of_the_single_operations(producer, slots, dtype) -> None:
    given = tensors(dtype)
    x, chosen = given["x"], [given[name] if name in slots else None for name in SLOTS]
    weight, bias, scale, shift = chosen
    h = tail(producer.tail, head(producer.head, x, weight, bias), scale, shift)
    for operand in OPERANDS:
        alone = torch.ops.fpc.quantize(h, operand, "l")
        fused = torch.ops.fpc.fused_quantize(x, *chosen, producer.name, EPS, operand, "l")
        assert len(alone) == len(fused)
        assert all(map(torch.equal, alone, fused))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [EPS, None])
def test_rms_norm_of_torch_is_the_wide_one(dtype: torch.dtype, eps: float | None) -> None:
    given = tensors(dtype)
    x, weight = given["x"] * 1e-3, given["weight"]
    number = torch.finfo(torch.float32).eps if eps is None else eps
    wide = produce(x, weight, None, None, None, "rms_norm_wide", number)
    assert torch.equal(torch.rms_norm(x, (C,), weight, eps), wide)


def test_where_an_rms_norm_rounds_matters_in_16_bits() -> None:
    given = tensors(torch.bfloat16)
    results = [
        produce(given["x"], given["weight"], None, None, None, name, EPS)
        for name in ("rms_norm", "rms_norm_wide")
    ]
    assert not torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_formulas_are_those_of_the_documentation(dtype: torch.dtype) -> None:
    """In fp64, with the error that roundings to the type of x explain."""
    given = {name: value.double() for name, value in tensors(dtype).items()}
    x = given["x"]
    r = 1 / (x.square().sum(-1, keepdim=True) / C + EPS).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    s = 1 / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    expected = {
        "rms_norm": x * r * given["weight"],
        "rms_norm_wide": x * r * given["weight"],
        "layer_norm": centred * s * given["weight"] + given["bias"],
        "silu": x / (1 + torch.exp(-x)),
        "gelu": x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "relu": x.clamp_min(0),
    }
    assert set(expected) == set(HEADS)
    stored = tensors(dtype)
    for name, reads in HEADS.items():
        weight, bias = (stored[slot] if slot in reads else None for slot in ("weight", "bias"))
        h = produce(stored["x"], weight, bias, None, None, name, EPS)
        # Two roundings to the type, and in fp32 what sums and functions lose: some units of the
        # largest value, since values near zero are differences.
        unit = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
        error = (h.double() - expected[name]).abs()
        assert (error <= unit * (expected[name].abs() + 1)).all(), name


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm_modulate", "silu_mul"])
def test_the_operator_is_a_good_citizen(name: str, operand: str) -> None:
    given = tensors(torch.bfloat16)
    needed = {*TAILS[PRODUCERS[name].tail][0], *HEADS[PRODUCERS[name].head]}
    chosen = [given[slot] if slot in needed else None for slot in SLOTS]
    torch.library.opcheck(
        torch.ops.fpc.fused_quantize.default, (given["x"], *chosen, name, EPS, operand, "l")
    )


def test_what_does_not_fit_is_refused_with_the_layer() -> None:
    x = normal(2, 32)

    def run(producer: str, values: Tensor = x, **slots: Tensor) -> None:
        chosen = [slots.get(name) for name in SLOTS]
        operand = "f8E4M3FN@token:f32"
        torch.ops.fpc.fused_quantize(values, *chosen, producer, EPS, operand, "a.b")

    with pytest.raises(NumericsError, match=r"^layer 'a.b': there is no producer 'tanh'\.$"):
        run("tanh")
    with pytest.raises(NumericsError, match=r"^layer 'a.b': silu_mul needs a scale\.$"):
        run("silu_mul")
    with pytest.raises(NumericsError, match=r"^layer 'a.b': rms_norm has no bias\.$"):
        run("rms_norm", bias=normal(32))
    with pytest.raises(NumericsError, match=r"^layer 'a\.b': "):
        run("relu", torch.full((2, 32), math.inf))
