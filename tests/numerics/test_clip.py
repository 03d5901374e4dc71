"""The clip of weights: never worse than none, and nothing where there is no real outer scale."""

import pytest
import torch
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.numerics import clip, dequantize, quantize
from fpcompiler.operand import Operand
from tests.models import normal


def squares(x: Tensor, values: Tensor, operand: Operand) -> Tensor:
    error = dequantize(*quantize(values, operand), operand) - x.float()
    return error.square().sum() if "tensor" in str(operand) else error.square().sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "text",
    [
        "f4E2M1FN@row:f32",
        "f4E3M0FN@tensor:f32",
        "f4E2M1FN@row:f32/block32:f8E8M0FNU",
        "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    ],
)
def test_the_error_is_never_more_than_without_a_clip(text: str, dtype: torch.dtype) -> None:
    operand, x = Operand.parse(text), (normal(16, 100) ** 3).to(dtype)
    clipped = clip(x, operand)
    assert clipped.dtype is dtype
    assert (clipped.abs() <= x.abs()).all()
    # The error of the chosen candidate is computed in another order here.
    assert (squares(x, clipped, operand) <= squares(x, x, operand) * (1 + 1e-5)).all()


def test_one_large_value_is_given_up_for_the_rest() -> None:
    operand, x = Operand.parse("f4E2M1FN@row:f32"), torch.full((2, 64), 1.7)
    x[0, 0] = 2.0
    clipped = clip(x, operand)
    assert clipped[0].max() < 2.0
    assert torch.equal(clipped[1], x[1])


@pytest.mark.parametrize("text", ["f4E2M1FN", "f4E2M1FN@block32:f8E8M0FNU", "f4E2M1FN@block32:f32"])
def test_without_a_real_outer_scale_there_is_nothing_to_search(text: str) -> None:
    x = normal(4, 64)
    assert clip(x, Operand.parse(text)) is x


def test_zeros_empty_tensors_and_what_is_no_number() -> None:
    operand = Operand.parse("f4E2M1FN@row:f32")
    assert torch.equal(clip(torch.zeros(2, 8), operand), torch.zeros(2, 8))
    assert clip(torch.zeros(0, 8), operand).shape == (0, 8)
    with pytest.raises(NumericsError, match="layer 'fc': input holds NaN/Inf"):
        clip(torch.full((2, 8), float("nan")), operand, layer="fc")
