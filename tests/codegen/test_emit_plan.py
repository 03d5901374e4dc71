"""The plan computes what the program computes: bit for bit, at every shape, with its state."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fpcompiler import ir
from fpcompiler.capture import capture
from fpcompiler.codegen.emit_plan import emit_plan
from fpcompiler.errors import IRError
from fpcompiler.passes import default_pipeline, run_pipeline
from fpcompiler.plan import Plan
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.operators import QUANTIZERS
from tests.models import Case, cases, normal
from tests.passes.tiny import Attention, tiny
from tests.programs import (
    Function,
    evaluate,
    import_named,
    leaves_of,
    program_of,
    quantized,
    run_passes,
    with_initial_state,
)

CASES = cases()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_executor_gives_the_bits_of_the_raised_graph(case: Case, captured) -> None:
    source = captured(case.name)
    program = import_named(source)
    run_pipeline(program, default_pipeline("w4a6"))
    model, args, kwargs = case.make()
    initial = {name: value.clone() for name, value in model.named_buffers() if case.state}
    for name, value in initial.items():
        program.weights[name] = value
    plan, tensors = emit_plan(program, source.signature, source.placeholders, source.symbols)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert set(plan.state) == {name for name in plan.state if "cache" in plan.state[name]}

    executor = Executor(plan, tensors)
    module = with_initial_state(ir.raise_to_fx(program), initial)
    for call in [(args, kwargs), *case.other_inputs()]:
        leaves = leaves_of(source, call)
        with torch.no_grad():
            expected = module(*leaves)
        result = executor.run_leaves(leaves)
        assert len(result) == len(expected)
        for value, wanted in zip(result, expected, strict=True):
            same = (
                torch.equal(value, wanted) if isinstance(wanted, torch.Tensor) else value == wanted
            )
            assert same


def plan_of(model: nn.Module, x: torch.Tensor, scheme: str) -> tuple[Plan, dict[str, torch.Tensor]]:
    source = capture(model, (x,))
    program = import_named(source)
    run_pipeline(program, default_pipeline(scheme))
    return emit_plan(program, source.signature, source.placeholders, source.symbols)


def test_the_rows_say_what_became_of_each_layer() -> None:
    plan, tensors = plan_of(tiny(Attention), normal(1, 4, 32), "w4a6; v: skip; out: w4a8-row")
    rows = {row.name: row for row in plan.layers}
    assert list(rows) == ["q", "k", "v", "out"]
    q, v, out = rows["q"], rows["v"], rows["out"]
    assert (q.op, q.shape, q.quantized, q.rule) == ("linear", (32, 32), True, "base")
    assert (q.weight, q.activation) == (
        "f4E2M1FN@row:f32/block32:f8E8M0FNU",
        "f6E2M3FN@block32:f8E8M0FNU",
    )
    assert (q.kernel, q.reason) == ("reference", "decode: torch.matmul")
    assert q.bytes_before == 32 * 32 * 4
    assert (
        q.bytes_after
        == 32 * 16 + 32 * 4 + 32
        == sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith("q.weight."))
    )
    assert (v.quantized, v.weight, v.activation, v.kernel) == (False, "f32", "f32", "torch")
    assert (v.reason, v.rule) == ("the scheme keeps it in high precision", "rule v")
    assert v.bytes_before == v.bytes_after == 4096
    assert (out.weight, out.activation) == ("f4E2M1FN@row:f32", "f8E4M3FN@token:f32")


def test_every_layer_has_one_step_that_gives_its_output() -> None:
    plan, _ = plan_of(CASES["vit"].make()[0], normal(2, 3, 32, 32), "w4a6")
    steps = [step.layer for step in plan.steps if step.layer]
    assert sorted(steps) == sorted(row.name for row in plan.layers)
    assert "patch" in steps
    (patch,) = (step for step in plan.steps if step.layer == "patch")
    assert patch.op == "aten.reshape.default"  # the image, not the product over the windows


def test_one_step_quantizes_the_input_of_q_k_and_v() -> None:
    plan, _ = plan_of(tiny(Attention), normal(1, 4, 32), "w4a6")
    quantizes = [step.op for step in plan.steps if step.op in QUANTIZERS]
    assert quantizes == ["fpc.fused_quantize", "fpc.quantize"]  # and the input of out
    assert sum(step.op == "fpc.linear" for step in plan.steps) == 4


def test_tied_tensors_are_stored_once_and_the_state_is_a_copy(captured) -> None:
    source = captured("tied")
    program = import_named(source)
    plan, tensors = emit_plan(program, source.signature, source.placeholders, source.symbols)
    assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)
    source = captured("cached")
    program = import_named(source)
    plan, tensors = emit_plan(program, source.signature, source.placeholders, source.symbols)
    own = {t.data_ptr() for t in program.weights.values()}
    assert all(tensors[key].data_ptr() not in own for key in plan.state.values())
    assert sorted(target for _, target in plan.stores) == sorted(plan.state)


def test_a_weight_that_layers_share_counts_once(captured) -> None:
    source = captured("tied")
    program = import_named(source)
    run_pipeline(program, default_pipeline("w4a6"))
    rows = emit_plan(program, source.signature, source.placeholders, source.symbols)[0].layers
    kept = [row for row in rows if not row.quantized and row.bytes_before == 0]
    assert [row.name for row in kept] == ["lm_head"]
    assert "its weight is that of 'embed'" in kept[0].reason


def distinct(self: Function, x: torch.Tensor) -> torch.Tensor:
    return torch.unique(x)


def test_an_operator_that_no_plan_may_hold_is_refused_with_its_place() -> None:
    with pytest.raises(IRError, match=r"programs\.py:\d+\): a compiled program cannot hold"):
        plan_of(Function(distinct), normal(3, 4), "w4a6")


def infinite(self: Function, x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(x > 0, float("-inf")).clamp(max=float("inf")).to(torch.float16)


def test_infinities_and_dtypes_survive_json() -> None:
    model, x = Function(infinite), normal(3, 4)
    plan, tensors = plan_of(model, x, "w4a6")
    again = Plan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False)))
    assert torch.equal(Executor(again, tensors).run(x), model(x))


FOREIGN = """
func.func @main() -> !torch.vtensor<[],f32> {
  %x = torch.operator "torch.prims.iota"() : () -> !torch.vtensor<[],f32>
    loc("iota"("layers.1"("net.py":3:0)))
  return %x : !torch.vtensor<[],f32>
}"""


def test_an_operator_that_is_not_aten_is_refused_with_its_place() -> None:
    from fpcompiler.plan import Signature
    from fpcompiler.tree import LEAF

    with pytest.raises(IRError) as caught:
        emit_plan(ir.parse_program(FOREIGN), Signature((), LEAF), (), {})
    assert str(caught.value) == (
        "layer 'layers.1' (net.py:3): a compiled program cannot hold prims.iota.default; only aten "
        "operators can be part of it. Replace it in the model by operations of torch."
    )


DEQUANTIZE = """
func.func @main(%x: !torch.vtensor<[2,64],f32>) -> !torch.vtensor<[2,64],f32> {
  %a = "fpq.quantize"(%x) : (!torch.vtensor<[2,64],f32>)
    -> !fpq.quantized<tensor<2x64xf6E2M3FN>, "token:f32">
  %y = "fpq.dequantize"(%a) : (!fpq.quantized<tensor<2x64xf6E2M3FN>, "token:f32">)
    -> !torch.vtensor<[2,64],f32>
  return %y : !torch.vtensor<[2,64],f32>
}"""


def test_a_weight_that_was_not_stored_and_a_dequantize_run_too() -> None:
    from fpcompiler.plan import Parameter, Placeholder, Signature
    from fpcompiler.tree import LEAF

    x = normal(2, 64)
    signature = Signature((Parameter("x", LEAF),), LEAF)
    program = ir.parse_program(DEQUANTIZE)
    plan, tensors = emit_plan(program, signature, (Placeholder("x", "float32", (2, 64)),), {})
    assert torch.equal(Executor(plan, tensors).run(x), evaluate(program, x)[0])

    model = nn.Linear(64, 8)
    program = quantized(model, x)
    run_passes(program, "lower-gemm")  # quantize-weights left out: packed at each call
    plan, tensors = emit_plan(program, signature, (Placeholder("x", "float32", (2, 64)),), {})
    stored = quantized(model, x)
    run_passes(stored, "quantize-weights,lower-gemm")
    assert torch.equal(Executor(plan, tensors).run(x), evaluate(stored, x)[0])
    assert program_of(model, x).stage is ir.Stage.CAPTURED


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.cell = nn.GRUCell(8, 8)
        self.table = nn.EmbeddingBag(10, 8)
        self.pairs = nn.Bilinear(8, 8, 4)
        self.mix = nn.Parameter(normal(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.cell(self.lstm(x)[0][:, -1]) + self.table(torch.zeros(2, 3, dtype=torch.int64))
        return self.pairs(y, torch.einsum("bi,oi->bo", y, self.mix))


def test_every_weight_that_is_kept_has_a_row() -> None:
    model = tiny(Unusual)
    plan, _ = plan_of(model, normal(2, 5, 8), "w4a6")
    rows = {row.name: row for row in plan.layers}
    assert {name: row.bytes_before for name, row in rows.items()} == {
        "lstm": 4 * 2 * 32 * 8,
        "cell": 4 * 2 * 24 * 8,
        "table": 4 * 10 * 8,
        "pairs": 4 * 4 * 8 * 8,
        "mix": 4 * 8 * 8,
    }
    assert all(row.reason and not row.quantized for row in rows.values())
    assert all(row.bytes_after == row.bytes_before for row in rows.values())
