"""The search for layers of one input: its loss is what it says, and never above that of rtn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FORMATS
from fpcompiler.numerics import dequantize, quantize, quantize_with
from fpcompiler.numerics.search import search_shared
from fpcompiler.operand import Operand
from tests.models import normal

WEIGHTS = [
    "f4E2M1FN@row:f32",
    "f4E2M1FN@block16:f8E8M0FNU",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    "f4E2M1FN@tensor:f32",
    "f8E4M3FN@row:f32",
]
INPUTS = ["", "f4E2M1FN@tensor:f32", "f6E2M3FN@token:f32", "f4E2M1FN@block16:f8E8M0FNU"]


def candidates(text: str) -> list[Operand]:
    own = Operand.parse(text)
    name, _, levels = text.partition("@")
    bits = own.format.storage_bits
    others = [f.name for f in FORMATS.values() if f.signed and f.storage_bits == bits]
    return [own, *(Operand.parse(f"{n}@{levels}") for n in others if n != name)]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(WEIGHTS), min_size=1, max_size=3),
    st.sampled_from(INPUTS),
    st.integers(0, 1 << 16),
    st.sampled_from([1, 3]),
)
def test_never_worse_than_rounding_to_nearest(texts, text, seed: int, power: int) -> None:
    x = normal(20, 32, seed=seed) ** power
    weights = [normal(6 + i, 32, seed=seed + i + 1) ** power for i in range(len(texts))]
    lists = [candidates(weight) for weight in texts]
    inputs = candidates(text) if text else []
    found = search_shared(x, x.T @ x, weights, lists, inputs)
    assert found.loss <= found.rtn_loss * (1 + 1e-5)

    seen = x
    if found.activation_scale is not None:
        scales = (found.activation_scale,)
        seen = dequantize(quantize_with(x, scales, found.activation), scales, found.activation)
    elif found.activation is not None:
        seen = dequantize(*quantize(x, found.activation), found.activation)
    total, count = 0.0, 0
    for weight, (operand, scales), allowed in zip(weights, found.weights, lists, strict=True):
        assert operand in allowed
        _, like = quantize(weight, operand)
        assert [(s.shape, s.dtype) for s in scales] == [(s.shape, s.dtype) for s in like]
        value = dequantize(quantize_with(weight, scales, operand), scales, operand)
        error = seen.double() @ value.double().T - x.double() @ weight.double().T
        total += float(error.square().sum())
        count += error.numel()
    assert found.loss == pytest.approx(total / count, rel=1e-3, abs=1e-9)
    assert found.activation is None or found.activation in inputs
    assert (found.activation is None) == (not text)


def test_a_static_scale_needs_an_input_per_tensor_and_weights_per_row() -> None:
    x, weights = normal(20, 32), [normal(8, 32, seed=1), normal(4, 32, seed=2)]

    def static(w: list[str], a: str) -> bool:
        operands = [[Operand.parse(text)] for text in w]
        found = search_shared(x, x.T @ x, weights, operands, [Operand.parse(a)])
        return found.activation_scale is not None

    rows, wide, blocks = WEIGHTS[0], WEIGHTS[4], WEIGHTS[1]
    assert static([rows, rows], INPUTS[1])
    assert not static([rows, wide], INPUTS[1])
    assert not static([rows, rows], INPUTS[2])
    assert not static([blocks, blocks], INPUTS[1])


def test_weights_that_are_worse_with_the_rounded_input_are_not_taken() -> None:
    x, weight = normal(2, 32, seed=11), normal(2, 32, seed=1011)
    operand, token = Operand.parse(WEIGHTS[0]), Operand.parse("f4E2M1FN@token:f32")
    alone = search_shared(x, x.T @ x, [weight], [[operand]], []).weights[0][1][0]
    assert not torch.equal(alone, quantize(weight, operand)[1][0])
    found = search_shared(x, x.T @ x, [weight], [[operand]], [token])
    assert found.loss == found.rtn_loss
    assert torch.equal(found.weights[0][1][0], quantize(weight, operand)[1][0])


def test_where_nothing_helps_rounding_to_nearest_stays() -> None:
    x = torch.eye(32)
    weight = torch.ones(4, 32)
    (operand, scales), = search_shared(
        x, x, [weight], [candidates(WEIGHTS[0])], []
    ).weights  # fmt: skip
    assert operand == Operand.parse(WEIGHTS[0])
    assert torch.equal(scales[0], quantize(weight, operand)[1][0])


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.full((4, 32), torch.inf), normal(4, 32), "input holds NaN/Inf"),
        (normal(4, 32), torch.full((4, 32), torch.nan), "input holds NaN/Inf"),
        # Their squares are infinite in fp32.
        (torch.full((4, 32), 1e25), normal(4, 32), "importance must be finite"),
    ],
    ids=["input", "weight", "huge"],
)
def test_values_that_cannot_be_searched_name_the_layer(x, weight, message: str) -> None:
    operand = Operand.parse(WEIGHTS[1])
    with pytest.raises(NumericsError, match=rf"^layer 'up': {message}"):
        search_shared(x, x.T @ x, [weight], [[operand]], [Operand.parse(INPUTS[3])], layer="up")
