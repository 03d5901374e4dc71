"""GPTQ against a second implementation, column by column, and what it promises for every input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.numerics import decode, dequantize, expand_scale, quantize, round_to
from fpcompiler.numerics.gptq import factorize, gptq, gptq_factored, output_error
from fpcompiler.operand import Operand
from tests.models import normal

OPERANDS = [
    "f4E2M1FN@row:f32",
    "f4E2M1FN@tensor:f32",
    "f4E1M2FN@block128:f32",
    "f4E3M0FN@row:f32/block32:f8E8M0FNU",
    "f4E2M1FN@block16:f8E8M0FNU:floor",
    "f4E2M1FN@block32:f8E8M0FNU:ceil",
    "f6E2M3FN@block32:f8E8M0FNU:rne",
    "f6E3M2FN@block128:f8E8M0FNU",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    "f8E4M3FN@row:f32",
    "f8E4M3FN",
]


def inputs(tokens: int, k: int, seed: int = 0) -> Tensor:
    """Correlated channels of different size, as a layer sees them."""
    mixed = normal(tokens, k // 4, seed=seed) @ normal(k // 4, k, seed=seed + 1)
    sizes = torch.exp(normal(k, seed=seed + 2))
    return (mixed / k**0.5 + 0.1 * normal(tokens, k, seed=seed + 3)) * sizes


def hessian_of(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def nearest(weight: Tensor, operand: Operand) -> Tensor:
    return dequantize(*quantize(weight, operand), operand)


def by_elimination(
    weight: Tensor, hessian: Tensor, operand: Operand, act_order: bool, damping: float
) -> Tensor:
    """Visit all columns with an explicit inverse that loses a row and a column each time."""
    k = weight.shape[1]
    _, scales = quantize(weight, operand)
    total = expand_scale(scales, operand, k).expand(weight.shape) if scales else None
    mean = float(hessian.diagonal().mean())
    inverse = torch.linalg.inv(hessian + damping * mean * torch.eye(k, dtype=torch.float64))
    order = sorted(range(k), key=lambda j: -float(hessian[j, j])) if act_order else range(k)
    left, result = weight.double().clone(), torch.zeros_like(weight)
    for j in order:
        scale = torch.ones(len(weight)) if total is None else total[:, j]
        result[:, j] = round_to(left[:, j].float() / scale, operand.format) * scale
        error = (left[:, j] - result[:, j]) / inverse[j, j]
        left -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[None, j] / inverse[j, j]
    return result


@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "in-order"])
@pytest.mark.parametrize("text", OPERANDS)
def test_equals_elimination_column_by_column(text: str, act_order: bool) -> None:
    operand, weight, hessian = Operand.parse(text), normal(24, 148), hessian_of(inputs(300, 148))
    codes, scales = gptq(weight, hessian, operand, act_order=act_order, block=32)
    plain = nearest(weight, operand)
    wanted = by_elimination(weight, hessian, operand, act_order, 0.01)
    worse = output_error(weight, wanted, hessian) > output_error(weight, plain, hessian)
    wanted[worse] = plain[worse]
    assert torch.equal(dequantize(codes, scales, operand), wanted)
    assert not torch.equal(wanted, plain)


def test_a_row_that_would_get_worse_is_rounded_to_nearest() -> None:
    operand, weight = Operand.parse("f4E3M0FN@row:f32"), normal(256, 16)
    hessian = torch.eye(16, dtype=torch.float64) + 0.05
    plain = nearest(weight, operand)
    visited = by_elimination(weight, hessian, operand, True, 0.01)
    worse = output_error(weight, visited, hessian) > output_error(weight, plain, hessian)
    assert 0 < int(worse.sum()) < 256
    value = dequantize(*gptq(weight, hessian, operand), operand)
    assert torch.equal(value[worse], plain[worse])
    assert torch.equal(value[~worse], visited[~worse])


@pytest.mark.parametrize("text", OPERANDS)
def test_independent_inputs_give_round_to_nearest(text: str) -> None:
    operand, weight = Operand.parse(text), normal(8, 75)
    codes, scales = gptq(weight, torch.diag(torch.arange(1.0, 76.0)), operand)
    wanted, wanted_scales = quantize(weight, operand)
    assert torch.equal(codes, wanted)
    assert all(map(torch.equal, scales, wanted_scales))


@pytest.mark.parametrize("text", OPERANDS[:-1])
def test_correlated_inputs_gain_clearly(text: str) -> None:
    operand, weight, hessian = Operand.parse(text), normal(64, 256), hessian_of(inputs(1024, 256))
    plain = output_error(weight, nearest(weight, operand), hessian).sum()
    for act_order, most in ((True, 0.2), (False, 0.4)):
        value = dequantize(*gptq(weight, hessian, operand, act_order=act_order), operand)
        assert output_error(weight, value, hessian).sum() < most * plain


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(OPERANDS),
    st.integers(1, 6),
    st.integers(1, 70),
    st.integers(1, 90),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.booleans(),
)
def test_no_row_is_ever_worse(
    text: str, rows: int, k: int, tokens: int, seed: int, damping: float, act_order: bool
) -> None:
    operand, weight = Operand.parse(text), normal(rows, k, seed=seed) ** 3
    hessian = hessian_of(normal(tokens, k, seed=seed + 1) ** 3)
    codes, scales = gptq(weight, hessian, operand, damping=damping, act_order=act_order)
    errors = output_error(weight, dequantize(codes, scales, operand), hessian)
    # The same sums as inside, so that not even a last bit differs.
    assert bool((errors <= output_error(weight, nearest(weight, operand), hessian)).all())


@settings(deadline=None, max_examples=20)
@given(st.integers(-60, 60), st.booleans())
def test_the_scale_of_the_hessian_does_not_matter(power: int, act_order: bool) -> None:
    operand, weight, hessian = Operand.parse(OPERANDS[0]), normal(8, 40), hessian_of(inputs(90, 40))
    codes, _ = gptq(weight, hessian, operand, act_order=act_order)
    for factor in (2.0**power, 3.0**power / 90):
        assert torch.equal(gptq(weight, hessian * factor, operand, act_order=act_order)[0], codes)


def test_the_block_and_the_dtype_of_the_weight_do_not_matter() -> None:
    operand, weight, hessian = Operand.parse(OPERANDS[3]), normal(9, 70), hessian_of(inputs(99, 70))
    weight = weight.bfloat16()
    codes, _ = gptq(weight, hessian, operand)
    for block in (1, 7, 70, 1000):
        assert torch.equal(gptq(weight, hessian, operand, block=block)[0], codes)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(gptq(weight.to(dtype), hessian, operand)[0], codes)


def test_weights_with_one_input_share_the_factor() -> None:
    operand, hessian = Operand.parse(OPERANDS[0]), hessian_of(inputs(200, 64))
    weights = [normal(rows, 64, seed=rows) for rows in (8, 16)]
    factor = factorize(hessian)
    together, _ = gptq_factored(torch.cat(weights), factor, operand)
    separate = [gptq_factored(weight, factor, operand)[0] for weight in weights]
    assert torch.equal(together, torch.cat(separate))
    assert torch.equal(separate[1], gptq(weights[1], hessian, operand)[0])


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = hessian_of(inputs(200, 48))
    factor = factorize(hessian, damping=0.02)
    ordered = hessian[factor.order][:, factor.order] / hessian.diagonal().mean()
    damped = ordered + 0.02 * torch.eye(48, dtype=torch.float64)
    assert factor.damping == 0.02
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(factor.upper.T @ factor.upper @ damped, torch.eye(48).double())
    assert bool((hessian.diagonal()[factor.order].diff() <= 0).all())
    assert factorize(hessian, act_order=False).order.tolist() == list(range(48))


def test_given_scales_are_used() -> None:
    operand, weight, hessian = Operand.parse(OPERANDS[4]), normal(8, 64), hessian_of(inputs(99, 64))
    _, scales = quantize(weight * 0.7, operand)
    codes, same = gptq(weight, hessian, operand, scales=scales)
    assert all(map(torch.equal, scales, same))
    total = expand_scale(scales, operand, 64)
    rounded = round_to(weight / total, operand.format) * total
    value = decode(codes, operand.format) * total
    gptq_error, plain = (output_error(weight, v, hessian) for v in (value, rounded))
    assert bool((gptq_error <= plain).all())
    assert gptq_error.sum() < 0.5 * plain.sum()


def test_channels_that_are_always_zero_are_rounded_to_nearest() -> None:
    operand, weight, x = Operand.parse(OPERANDS[0]), normal(8, 40), inputs(99, 40)
    x[:, ::5] = 0.0
    codes, _ = gptq(weight, hessian_of(x), operand, damping=0.0)
    wanted, _ = quantize(weight, operand)
    assert torch.equal(codes[:, ::5], wanted[:, ::5])
    assert not torch.equal(codes, wanted)
    assert torch.equal(gptq(weight, torch.zeros(40, 40), operand)[0], wanted)


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_channels_that_are_always_zero_change_nothing_for_others(damping: float) -> None:
    operand, weight, hessian = Operand.parse(OPERANDS[4]), normal(8, 48), hessian_of(inputs(99, 48))
    wider = torch.nn.functional.pad(hessian, (0, 16, 0, 16))
    factor = factorize(wider, damping=damping)
    assert factor.damping == damping
    assert torch.equal(factor.upper[:48, :48], factorize(hessian, damping=damping).upper)
    codes, _ = gptq_factored(torch.cat([weight, normal(8, 16)], 1), factor, operand)
    assert torch.equal(codes[:, :48], gptq(weight, hessian, operand, damping=damping)[0])


def test_damping_grows_until_the_hessian_can_be_factorized() -> None:
    x = normal(10, 64)
    factor = factorize(hessian_of(x), damping=0.0)
    assert 0 < factor.damping <= 1e-4
    with pytest.raises(NumericsError, match=r"layer 'fc': the Hessian .* not positive definite"):
        factorize(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), layer="fc")


def test_output_error_is_that_of_the_outputs() -> None:
    x, weight = inputs(50, 24).double(), normal(6, 24)
    value = nearest(weight, Operand.parse(OPERANDS[0]))
    outputs = x @ (value.double() - weight.double()).T
    wanted = outputs.square().sum(0)
    torch.testing.assert_close(output_error(weight, value, hessian_of(x)), wanted)
    torch.testing.assert_close(output_error(weight, value, hessian_of(x) / 50), wanted / 50)


def test_empty_weights() -> None:
    operand = Operand.parse(OPERANDS[0])
    assert gptq(torch.zeros(0, 4), torch.eye(4), operand)[0].shape == (0, 4)
    assert gptq(torch.zeros(4, 0), torch.zeros(0, 0), operand)[0].shape == (4, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4)}, r"a weight \[4\] does not fit a Hessian \[4, 4\]"),
        ({"weight": torch.zeros(2, 5)}, r"a weight \[2, 5\] does not fit"),
        ({"weight": torch.full((2, 4), torch.nan)}, "layer 'fc': input holds NaN/Inf"),
        ({"hessian": torch.zeros(4, 3)}, r"a Hessian is floating-point \[K, K\]"),
        ({"hessian": torch.full((4, 4), torch.inf)}, "Hessian of its input holds NaN/Inf"),
        ({"hessian": -torch.eye(4)}, "negative diagonal"),
        ({"damping": -0.1}, "a damping of -0.1 is not between 0 and 1"),
        ({"block": 0}, "a block of 0 columns"),
        ({"scales": ()}, r"needs the scales \['torch.float32 \[2, 1\]'\] here, not \[\]"),
        ({"scales": (torch.zeros(2, 1),)}, "a scale is not a positive number"),
        ({"scales": (torch.full((2, 1), torch.nan),)}, "a scale is not a positive number"),
    ],
)
def test_refusals_name_the_layer(change: dict[str, object], message: str) -> None:
    call = {"weight": torch.ones(2, 4), "hessian": torch.eye(4), "layer": "fc", **change}
    with pytest.raises(NumericsError, match=message) as refused:
        gptq(operand=Operand.parse("f4E2M1FN@row:f32"), **call)
    assert "layer 'fc'" in str(refused.value)


def test_output_error_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(NumericsError, match=r"a Hessian \[3, 3\] do not fit"):
        output_error(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3, 3))
