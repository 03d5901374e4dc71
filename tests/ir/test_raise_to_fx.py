"""A program executes at every stage; before quantization it gives the bits of the eager model."""

from __future__ import annotations

import re

import pytest
import torch

from fpcompiler import ir
from fpcompiler.errors import IRError
from tests.models import Case, cases, normal
from tests.programs import (
    Function,
    evaluate,
    import_named,
    leaves_of,
    program_of,
    results_of,
    run_passes,
    with_initial_state,
)

CASES = cases()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bit_equal_to_eager_as_captured_normalized_and_parsed_again(case: Case, captured) -> None:
    program = captured(case.name)
    model, args, kwargs = case.make()
    state = {name: value.clone() for name, value in model.named_buffers() if case.state}
    calls = [(args, kwargs), *case.other_inputs()]
    wanted = [results_of(program, model, call) for call in calls]

    whole = import_named(program)
    text = ir.print_program(whole)
    parsed = ir.parse_program(text, whole.weights)
    assert ir.print_program(parsed) == text
    normalized = import_named(program)
    run_passes(normalized, "cse,normalize,fold-constants,canonicalize,symbol-dce")
    assert ir.print_program(normalized) != text

    for stage in (whole, parsed, normalized):
        module = with_initial_state(ir.raise_to_fx(stage), state)
        for call, expected in zip(calls, wanted, strict=True):
            with torch.no_grad():
                values = module(*leaves_of(program, call))
            results = [value for value in values if isinstance(value, torch.Tensor)]
            assert len(results) == len(expected)
            assert all(map(torch.equal, results, expected))


def test_the_state_is_updated_in_place(captured) -> None:
    case = CASES["cached"]
    program = captured("cached")
    model, args, kwargs = case.make()
    state = {name: value.clone() for name, value in model.named_buffers()}
    module = with_initial_state(ir.raise_to_fx(import_named(program)), state)
    keys = {name: key for key, name in module.meta["globals"].items()}
    cache = getattr(module, keys["k_cache"])
    assert not cache.any()
    module(*leaves_of(program, (args, kwargs)))
    model(*args, **kwargs)
    assert getattr(module, keys["k_cache"]) is cache
    assert torch.equal(cache, model.k_cache)
    assert cache[:, :, :4].any()
    assert not cache[:, :, 4:].any()


def test_nodes_know_their_layer_their_place_and_their_global() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
    module = ir.raise_to_fx(program_of(model, normal(2, 8)))
    (linear,) = (n for n in module.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert linear.meta["layer"] == "0"
    assert re.fullmatch(r"layer '0' \(.*modules/linear\.py:\d+\)|layer '0'", linear.meta["place"])
    assert sorted(module.meta["globals"].values()) == ["0.bias", "0.weight"]


def scalars(self, x: torch.Tensor) -> torch.Tensor:
    rows, columns = x.shape
    y = x.new_full((rows * 2 - 1, columns // 2), float("-inf"))
    return torch.cat([y, x.view(-1, columns // 2), x.new_zeros(rows // 2 + 1, 5)], 0)


def several(self, x: torch.Tensor) -> torch.Tensor:
    values, indices = x.topk(2, dim=-1)
    first, *rest = x.split([1, 3, 4], dim=-1)
    return values.sum() + indices.float().mean() + first.sum() * rest[-1].amax() + (x > 0).sum()


def literals(self, x: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([[1.0, -2.0], [float("inf"), 0.5]])
    return x[:, :2] * table[0] + torch.tensor(3) + torch.arange(2)


@pytest.mark.parametrize("function", [several, literals], ids=lambda f: f.__name__)
def test_several_results_scalars_and_literals(function) -> None:
    model = Function(function)
    program = program_of(model, normal(3, 8))
    for rows in (1, 3, 6):
        x = normal(rows, 8, seed=rows)
        (result,) = evaluate(program, x)
        assert torch.equal(result, model(x))


def test_arithmetic_on_sizes() -> None:
    model = Function(scalars)
    program = program_of(model, normal(5, 10), dynamic={"x": {0: torch.export.Dim("rows", max=60)}})
    for rows in (6, 12):
        x = normal(rows, 10, seed=rows)
        (result,) = evaluate(program, x)
        assert torch.equal(result, model(x))


def test_quantized_programs_execute_before_and_after_the_weights_are_stored() -> None:
    model, x = torch.nn.Linear(40, 8), normal(3, 40)
    program = program_of(model, x)
    run_passes(program, 'normalize,insert-quantize{scheme="w4a6,skip=none"}')
    (before,) = evaluate(program, x)
    run_passes(program, "quantize-weights,lower-gemm")
    (after,) = evaluate(program, x)
    assert torch.equal(before, after)
    error = (after - model(x)).norm() / model(x).norm()
    assert 0 < error < 0.25


DEQUANTIZED = """
module {{
  ml_program.global private @codes(#ml_program.extern<{codes}>) : {codes}
  ml_program.global private @scale(#ml_program.extern<tensor<4x1xf32>>) : tensor<4x1xf32>
  func.func @main() -> !torch.vtensor<[4,33],f32> {{
    %codes = ml_program.global_load @codes : {codes}
    %scale = ml_program.global_load @scale : tensor<4x1xf32>
    %none = torch.constant.none
    %w = "fpq.assemble"(%codes, %scale, %none) : ({codes}, tensor<4x1xf32>, !torch.none)
        -> !fpq.quantized<{codes}, "row:f32">
    %y = "fpq.dequantize"(%w) : (!fpq.quantized<{codes}, "row:f32">) -> !torch.vtensor<[4,33],f32>
    return %y : !torch.vtensor<[4,33],f32>
  }}
}}
"""


@pytest.mark.parametrize("element", ["f4E2M1FN", "f6E2M3FN", "f8E4M3FN"])
def test_a_stored_weight_can_be_dequantized(element: str) -> None:
    from fpcompiler import numerics
    from fpcompiler.operand import Operand

    operand = Operand.parse(f"{element}@row:f32")
    codes, scales = numerics.quantize(normal(4, 33), operand)
    packed = numerics.pack(codes, operand.format.storage_bits)
    weights = ir.Weights({"codes": packed, "scale": scales[0]})
    program = ir.parse_program(DEQUANTIZED.format(codes=f"tensor<4x33x{element}>"), weights)
    (value,) = evaluate(program)
    assert torch.equal(value, numerics.dequantize(codes, scales, operand))


def test_an_operation_that_torch_does_not_have_is_an_error_with_its_place() -> None:
    text = """
    func.func @main(%x: !torch.vtensor<[2],f32>) -> !torch.vtensor<[2],f32> {
      %y = torch.operator "torch.aten.no_such_thing"(%x)
        : (!torch.vtensor<[2],f32>) -> !torch.vtensor<[2],f32> loc("y"("layers.3"("net.py":7:0)))
      return %y : !torch.vtensor<[2],f32>
    }"""
    with pytest.raises(IRError) as caught:
        ir.raise_to_fx(ir.parse_program(text))
    assert str(caught.value) == (
        "layer 'layers.3' (net.py:7): the operation torch.operator (torch.aten.no_such_thing) "
        "cannot be executed; it is no operator of this version of torch. Passes must emit torch or "
        "fpq operations only."
    )
