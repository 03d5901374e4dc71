"""``preshift``: what rounding makes of it, how it composes, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fpcompiler
from fpcompiler import ir, numerics, passes
from fpcompiler.calibration import input_groups
from fpcompiler.errors import PassError
from fpcompiler.formats import FORMATS, parse_format
from fpcompiler.ir.stored import given_scales
from fpcompiler.ir.torch_ops import text_of
from fpcompiler.ir.types import quantized_type
from fpcompiler.numerics.powers import exact_power
from fpcompiler.numerics.preshift import preshift
from fpcompiler.numerics.shift_lowering import bucket_permutation, container_limit
from fpcompiler.operand import Operand
from fpcompiler.passes.shift_channels import CONTAINERS
from fpcompiler.passes.weights import OpenWeights
from tests.models import LlamaBlock, normal
from tests.passes.shifting import (
    BLOCK,
    ROW,
    TENSOR,
    Product,
    notes,
    program_of,
    run,
    uneven,
    uneven_input,
    without_quantization,
)
from tests.passes.tiny import Mlp, tiny
from tests.programs import count, evaluate, quantized, run_passes


def exponents_of(x: Tensor, format: str) -> Tensor:
    return preshift(x.abs().amax(0), parse_format(format)).exponents


def simulated(x: Tensor, weight: Tensor, k: Tensor, operands: Sequence[str]) -> Tensor:
    """Quantize ``x_j`` with ``2**-k_j`` in its scale and the weight as it is, and multiply.

    Elements are small integers times powers of two, so their sums are exact; the scales of rows
    and tokens come after, in fp32.
    """
    w_operand, x_operand = map(Operand.parse, operands)
    x_codes, x_scales = numerics.quantize(x * exact_power(k), x_operand)
    w_codes, w_scales = numerics.quantize(weight, w_operand)
    x_values = numerics.decode(x_codes, x_operand.format).double() * exact_power(-k)
    w_values = numerics.decode(w_codes, w_operand.format).double()
    if w_operand.block is not None:
        inner = Operand(w_operand.format, (w_operand.block,))
        w_values = numerics.dequantize(w_codes, w_scales[-1:], inner).double()
    return (x_values @ w_values.T).float() * x_scales[0] * w_scales[0].T


@pytest.mark.parametrize("format", ["f4E2M1FN", "f4E1M2FN", "f6E2M3FN"])
@pytest.mark.parametrize("levels", ["token:f32", "tensor:f32"])
def test_folded_codes_compute_what_shifted_biases_mean(format: str, levels: str) -> None:
    data, x, weight = uneven_input(32, 48), uneven_input(8, 48, seed=1), normal(16, 48, seed=2)
    operands = "f4E2M1FN@row:f32", f"{format}@{levels}"
    scheme = f"w={operands[0]},a={operands[1]},skip=none"
    program = quantized(Product(weight), x, scheme=scheme)
    run(program, "preshift,quantize-weights", data)
    (linear,) = program.operations("fpq.linear")
    kind = quantized_type(linear.operands[1])
    assert kind is not None
    assert str(kind.operand) == "f6E3M2FN@row:f32"
    expected = simulated(x, weight, exponents_of(data, format), operands)
    (result,) = evaluate(program, x)
    assert torch.equal(result, expected)


def test_the_worked_example_of_the_specification() -> None:
    data = torch.tensor([[8, 3, 0.9, 0.1], [7.1, -2.2, 0.8, 0.09]])
    weight = torch.tensor([[0.5, -1.5, 3, 2], [1, 4, -6, 0.5]])
    program = quantized(Product(weight), data, scheme=TENSOR)
    run(program, "preshift,quantize-weights", data)
    (result,) = evaluate(program, data)
    torch.testing.assert_close(result[1], torch.tensor([9.166667, -3.958333]))


def test_permuted_blocks_compute_what_shifted_biases_mean() -> None:
    data, x, weight = uneven_input(32, 160), uneven_input(8, 160, seed=1), normal(16, 160, seed=2)
    operands = "f4E2M1FN@row:f32/block32:f8E8M0FNU", "f4E2M1FN@token:f32"
    program = quantized(Product(weight), x, scheme=BLOCK)
    (result, _) = run(program, "preshift{max_padding=1},quantize-weights", data)
    buckets = bucket_permutation(exponents_of(data, "f4E2M1FN"), group=32, max_buckets=4)
    assert result.statistics["zeros added"] == len(buckets.order) - 160 > 0
    (linear,) = program.operations("fpq.linear")
    kind = quantized_type(linear.operands[1])
    assert kind is not None
    assert str(kind.operand) == operands[0]
    k = buckets.group_exponents.repeat_interleave(32)
    expected = simulated(buckets.permute(x), buckets.permute(weight), k, operands)
    (found,) = evaluate(program, x)
    assert torch.equal(found, expected)


def test_permuting_stops_where_zeros_cost_too_much() -> None:
    data = uneven_input(32, 160)
    program = quantized(Product(normal(16, 160)), data, scheme=BLOCK)
    (result,) = run(program, "preshift{max_padding=0.2}", data)
    assert 0 < result.statistics["zeros added"] <= 32
    (left,) = run(
        quantized(Product(normal(16, 160)), data, scheme=BLOCK), "preshift{max_padding=0}", data
    )
    assert left.statistics == {"inputs left: more zeros than max_padding": 1}


def test_smooth_rounds_the_divided_weight() -> None:
    data, weight = uneven_input(32, 48), normal(16, 48, seed=2)
    program = quantized(Product(weight), data, scheme=ROW)
    run(program, "preshift{lowering=smooth}", data)
    groups = input_groups(program)
    (open_weight,) = OpenWeights(program, groups).of(groups[0])
    power = exact_power(exponents_of(data, "f6E2M3FN"))
    assert torch.equal(OpenWeights(program, groups).value(open_weight), weight / power)
    assert count(program, "fpq.fold") == 0


def stored_weight(program: ir.Program) -> Tensor:
    """Return the values of the one weight."""
    (linear,) = program.operations("fpq.linear")
    kind = quantized_type(linear.operands[1])
    assert kind is not None
    codes, *scales = [
        program.weights[name]
        for value in linear.operands[1].owner.operands
        if (name := ir.build.global_of(value)) is not None
    ]
    k = kind.shape[-1]
    assert k is not None
    return numerics.dequantize_packed(codes, tuple(scales), kind.operand, k)


@pytest.mark.parametrize("others", ["gptq", "quantize-weights{clip=mse}"])
def test_passes_after_it_round_as_if_it_were_not_there(others: str) -> None:
    data, weight = uneven_input(192, 48), normal(16, 48, seed=2)
    values = []
    for text in (others, f"preshift,{others}"):
        program = quantized(Product(weight), data, scheme=ROW)
        run(program, text, data)
        values.append(stored_weight(program))
    power = exact_power(exponents_of(data, "f6E2M3FN"))
    assert torch.equal(values[1] * power, values[0])
    assert not torch.equal(
        values[0],
        numerics.dequantize(
            *numerics.quantize(weight, Operand.parse("f4E2M1FN@row:f32")),
            Operand.parse("f4E2M1FN@row:f32"),
        ),
    )


@pytest.mark.parametrize("scheme", [ROW, BLOCK])
def test_a_weight_that_is_not_stored_yet_computes_the_same(scheme: str) -> None:
    data = uneven_input(32, 160)
    program = quantized(Product(normal(16, 160)), data, scheme=scheme)
    run(program, "preshift{max_padding=1}", data)
    (before,) = evaluate(program, data)
    run(program, "quantize-weights", data)
    assert count(program, "fpq.fold") == 0
    assert torch.equal(evaluate(program, data)[0], before)


def test_a_shifted_layer_is_not_searched_or_rotated_again() -> None:
    data = uneven_input(32, 64)
    program = quantized(Product(normal(16, 64)), data, scheme=ROW)
    results = run(program, "preshift,search-formats,rotate", data)
    assert results[1].statistics == {"groups left: shifted already": 1}
    assert results[2].statistics == {"groups of layers not rotated": 1}


def test_permuted_weights_can_be_rounded_with_gptq() -> None:
    data = uneven_input(640, 160)
    weight = normal(16, 160, seed=2)
    errors = []
    for text in ("quantize-weights", "gptq"):
        program = quantized(Product(weight), data, scheme=BLOCK)
        run(program, f"preshift{{max_padding=1}},{text}", data)
        errors.append((without_quantization(program, data) - data @ weight.T).square().mean())
    assert errors[1] < errors[0]


def test_searched_scales_are_kept() -> None:
    data, weight = uneven_input(96, 48), normal(16, 48, seed=2)
    values = []
    for text in ("", ",preshift{rho=search}"):
        program = quantized(Product(weight), data, scheme=TENSOR)
        run(program, f"search-formats{{formats=given}}{text},quantize-weights", data)
        values.append(stored_weight(program))
    ratio = values[0] / values[1]
    powers = ratio.nan_to_num(1).amax(0)
    assert torch.equal(values[1] * powers, values[0])
    assert powers.max() > 1


def test_a_searched_range_is_static_and_never_worse() -> None:
    data, weight = uneven_input(96, 48), normal(16, 48, seed=2)
    operand = Operand.parse("f4E2M1FN@row:f32")
    rounded = numerics.dequantize(*numerics.quantize(weight, operand), operand)
    errors = []
    for rho in ("max", "search"):
        program = quantized(Product(weight), data, scheme=TENSOR)
        run(program, f"preshift{{rho={rho}}},quantize-weights", data)
        assert count(program, "fpq.encode") == (rho == "search")
        errors.append((evaluate(program, data)[0] - data @ rounded.T).square().mean())
    assert errors[1] <= errors[0]


def test_dumps_and_plan_say_what_was_done_and_shown() -> None:
    program = program_of("llama")
    run(program, "preshift", normal(2, 8, 64))
    assert notes(program)["down_proj"] == (
        "input times 2**k, k to 3, in the rows of up_proj; weights hold 2**-k in their codes"
    )
    text = ir.print_program(program)
    assert (
        'fpq.proof = "5120 of 5120 values of shifted inputs and 1024 of 1024 of the results equal '
        'bit for bit"'
    ) in text
    assert '"fpq.fold"' in text


def test_an_artifact_holds_the_shifted_model(tmp_path: Path) -> None:
    x = normal(2, 8, 64)
    model = uneven(LlamaBlock)
    steps = f'cse,normalize,fold-constants,insert-quantize{{scheme="{ROW}"}},cse,preshift,gptq'
    compiled = fpcompiler.compile(
        model,
        ROW,
        example_inputs=x,
        calibration=[normal(64, 8, 64)],
        pipeline=f"{steps},quantize-weights,lower-gemm,canonicalize,symbol-dce",
    )
    compiled.save(tmp_path / "model")
    loaded = fpcompiler.load(tmp_path / "model")
    assert torch.equal(loaded(x), compiled(x))
    rows = {row["name"]: row for row in compiled.plan().to_json()["rows"]}
    assert rows["q_proj"]["weight"] == "f6E3M2FN@row:f32"
    assert rows["q_proj"]["reason"] == (
        "decode: torch.matmul; input times 2**k, k to 3, in attention_norm.weight; "
        "weights hold 2**-k in their codes; weight rounded by gptq"
    )


def test_inputs_that_it_cannot_help_are_counted() -> None:
    x = normal(4, 32)
    program = quantized(tiny(Mlp), x, scheme="w4a6,skip=none")
    text = ir.print_program(program)
    (result,) = run(program, "preshift", x)
    assert result.statistics == {"inputs left: scales of blocks": 3}
    assert ir.print_program(program) == text
    weights_only = quantized(tiny(Mlp), x, scheme="w4a16,skip=none")
    (result,) = run(weights_only, "preshift", x)
    assert result.statistics == {"inputs left: not quantized": 3}
    even = quantized(Product(normal(8, 32)), torch.ones(4, 32), scheme=ROW)
    (result,) = run(even, "preshift", torch.ones(4, 32))
    assert result.statistics == {"inputs left: a shift does not help": 1}
    stored = quantized(tiny(Mlp), x, scheme=ROW)
    run(stored, "quantize-weights", x)
    (result,) = run(stored, "preshift", x)
    assert result.statistics == {"inputs left: weights stored or computed": 3}


def test_it_needs_calibration_data() -> None:
    program = quantized(tiny(Mlp), normal(4, 32), scheme=ROW)
    with pytest.raises(PassError, match=r"^preshift needs calibration data: compile\("):
        run_passes(program, "preshift")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preshift{lowering=fold}", "lowering must be one of auto, permute, container, smooth"),
        ("preshift{rho=min}", "rho must be one of max, search"),
        ("preshift{rounding=up}", "rounding must be one of floor, round, code"),
        ("preshift{limit=32}", "limit must be 0 to 31"),
        ("preshift{max_buckets=0}", "max_buckets at least 1"),
    ],
)
def test_wrong_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        passes.parse_pipeline(text)


def test_rows_have_no_block_scales_to_permute_for() -> None:
    x = uneven_input(8, 32)
    program = quantized(Product(normal(8, 32)), x, scheme=ROW)
    with pytest.raises(PassError, match="layer 'layer': its weights have no block scales"):
        run(program, "preshift{lowering=permute}", x)


def test_shifts_go_as_far_as_a_format_holds_the_weights() -> None:
    x = normal(64, 32) * exact_power(-torch.arange(32))
    scheme = "w=f6E2M3FN@row:f32,a=f8E5M2@token:f32,skip=none"
    program = quantized(Product(normal(8, 32)), x, scheme=scheme)
    (result,) = run(program, "preshift", x)
    held = container_limit(FORMATS["f6E2M3FN"], 31, [FORMATS[name] for name in CONTAINERS])
    assert result.statistics["largest k"] == held == 11
    none = "w=f8E5M2@row:f32,a=f8E5M2@token:f32,skip=none"
    program = quantized(Product(normal(8, 32)), x, scheme=none)
    (result,) = run(program, "preshift", x)
    assert result.statistics == {"inputs left: a shift does not help": 1}


def test_a_static_scale_is_searched_where_no_shift_helps() -> None:
    x = normal(64, 1).expand(64, 32).contiguous()
    x[0] = 40.0
    program = quantized(Product(normal(40, 32)), x, scheme=TENSOR)
    (result,) = run(program, "preshift{rho=search}", x)
    assert result.statistics == {"inputs left: a shift does not help": 1}
    (encode,) = program.operations("fpq.encode")
    (scale,) = given_scales(program, encode)
    assert 0 < float(scale) < 40 / 6
    (linear,) = program.operations("fpq.linear")
    assert "static scale" in text_of(linear.attributes["fpq.note"])


@pytest.mark.parametrize("method", ["preshift", "search-preshift"])
def test_methods_shift_and_choose(method: str) -> None:
    model, x = tiny(Mlp), uneven_input(64, 32)
    wanted = model(x).detach()
    compiled = fpcompiler.compile(model, TENSOR, calibration=[x], method=method)
    plain = fpcompiler.compile(model, TENSOR, calibration=[x], method="rtn")
    assert float((compiled(x) - wanted).norm()) < 0.8 * float((plain(x) - wanted).norm())
    assert "input times 2**k" in compiled.plan().rows[0].reason
