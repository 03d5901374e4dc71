"""group-heads: keys and values that are repeated as models write it, and near misses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fpcompiler import ir
from fpcompiler.capture import capture
from fpcompiler.codegen.emit_plan import emit_plan
from fpcompiler.errors import PassError
from fpcompiler.passes import default_pipeline, run_pipeline
from fpcompiler.runtime.executor import Executor
from tests.hf_models import hf_model
from tests.models import normal, token_ids
from tests.programs import count, evaluate, import_named, program_of, run_passes

H, G, N, D = 6, 2, 5, 8
LOWER = (
    "cse,normalize,fold-constants,insert-quantize{},cse,quantize-weights,lower-gemm,canonicalize"
)
ATTENTION = "torch.aten.scaled_dot_product_attention"
DONE = {"attention with grouped heads": 1}

Repeat = Callable[[Tensor], Tensor]


def repeated(x: Tensor) -> Tensor:
    b, g, n, d = x.shape
    return x[:, :, None].expand(b, g, H // g, n, d).reshape(b, H, n, d)


def interleaved(x: Tensor) -> Tensor:
    b, g, n, d = x.shape
    return x[:, None].expand(b, H // g, g, n, d).reshape(b, H, n, d)


def reordered(x: Tensor) -> Tensor:
    b, g, n, d = x.shape
    return x[:, :, None].expand(b, g, H // g, n, d).reshape(b, n, H, d).transpose(1, 2)


class Grouped(nn.Module):
    """Attention with keys and values of fewer heads."""

    def __init__(self, keys: Repeat, values: Repeat) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, self.keys(k), self.values(v))


def heads(number: int) -> Tensor:
    return normal(2, number, N, D, seed=number)


def lowered(keys: Repeat, values: Repeat, *inputs: Tensor, dynamic: object = None) -> ir.Program:
    program = program_of(Grouped(keys, values), *inputs, dynamic=dynamic)
    run_passes(program, LOWER)
    return program


@pytest.mark.parametrize("dynamic", [None, "auto"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_repeated_heads_are_read_where_they_are(groups: int, dynamic: object) -> None:
    inputs = heads(H), heads(groups), heads(groups) + 1
    program = lowered(repeated, repeated, *inputs, dynamic=dynamic)
    expected = evaluate(program, *inputs)
    result, _ = run_passes(program, "group-heads,canonicalize")
    assert result.statistics == DONE
    assert count(program, "torch.aten.expand", "torch.aten.unsqueeze") == 0
    assert count(program, ATTENTION) == 1
    assert all(map(torch.equal, evaluate(program, *inputs), expected))
    again = ir.parse_program(ir.print_program(program), program.weights)
    assert all(map(torch.equal, evaluate(again, *inputs), expected))


@pytest.mark.parametrize(
    ("keys", "values"),
    [(interleaved, repeated), (repeated, interleaved), (reordered, reordered)],
)
def test_other_orders_of_heads_are_left(keys: Repeat, values: Repeat) -> None:
    program = lowered(keys, values, heads(H), heads(G), heads(G))
    before = ir.print_program(program)
    (result,) = run_passes(program, "group-heads")
    assert not result.statistics
    assert ir.print_program(program) == before


def test_keys_and_values_of_different_groups_are_left() -> None:
    program = lowered(repeated, repeated, heads(H), heads(3), heads(2))
    (result,) = run_passes(program, "group-heads")
    assert not result.statistics


def test_what_something_else_reads_stays() -> None:
    class Both(Grouped):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            wide = self.keys(k)
            return functional.scaled_dot_product_attention(q, wide, self.values(v)) + wide

    inputs = heads(H), heads(G), heads(G)
    program = program_of(Both(repeated, repeated), *inputs, dynamic=None)
    run_passes(program, LOWER)
    expected = evaluate(program, *inputs)
    (result,) = run_passes(program, "group-heads")
    assert result.statistics == DONE
    assert count(program, "torch.aten.expand") == 1
    assert all(map(torch.equal, evaluate(program, *inputs), expected))


def test_the_pass_wants_chosen_kernels() -> None:
    program = program_of(Grouped(repeated, repeated), heads(H), heads(G), heads(G))
    with pytest.raises(PassError, match="group-heads needs a program at stage lowered"):
        run_passes(program, "normalize,group-heads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "found"), [("hf-llama", 2), ("hf-mistral", 2), ("hf-opt", 0)])
def test_models_of_hugging_face(name: str, found: int, dtype: torch.dtype) -> None:
    ids = token_ids(2, 12)
    source = capture(hf_model(name).to(dtype), (ids,), {}, dynamic=None)
    full = default_pipeline("w4a6", target="reference")
    results = []
    for pipeline in (tuple(p for p in full if p.name != "group-heads"), full):
        program = import_named(source)
        steps = run_pipeline(program, pipeline)
        plan, weights = emit_plan(program, source.signature, source.placeholders, source.symbols)
        results.append(Executor(plan, weights).run_leaves([ids]))
    counted = sum(step.statistics.get(next(iter(DONE)), 0) for step in steps)
    assert counted == found
    assert all(map(torch.equal, *results))
