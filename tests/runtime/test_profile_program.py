"""Measuring programs: times are those of the program, and kernels are those that ran."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.native import library
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.profile import WARM_UP_CALLS, profile
from fpcompiler.runtime.profile_report import Profile
from fpcompiler.runtime.program import ChangedError, Program
from fpcompiler.runtime.program.run import Segment, TorchStep
from tests.models import cases, normal, token_ids
from tests.plans import mlp_artifact

pytestmark = pytest.mark.skipif(library() is None, reason="needs the native library")

X = normal(5, 64)
TOKEN = (token_ids(2, 1), torch.tensor([5]))


def mlp(kernel: str = "cpu") -> Executor:
    artifact = mlp_artifact()
    steps = (replace(s, kernel=kernel) if s.kernel else s for s in artifact.plan.steps)
    return Executor(replace(artifact.plan, steps=tuple(steps)), artifact.tensors)


@pytest.fixture(scope="module")
def decoder() -> Executor:
    model, args, kwargs = cases()["decoder-llama"].make()
    compiled = fpcompiler.compile(model, "w4a6", example_inputs=args, example_kwargs=kwargs)
    return Executor(compiled.artifact.plan, compiled.artifact.tensors)


def measured(executor: Executor, leaves: Sequence[Tensor], **patches: Any) -> Profile:
    """Profile few calls, with methods of the executor replaced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpcompiler.runtime.profile.WARM_UP_SECONDS", 1e-9)
        for name, value in patches.items():
            patch.setattr(Executor, name, value)
        return profile(executor, list(leaves), iterations=4)


def require_consistent(found: Profile) -> None:
    """Check that rows, steps, kernels, parts and layers tell of the same time."""
    timeline, total = found.timeline, found.timeline.call_seconds()
    split = timeline.split()
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert sum(row.seconds for row in found.rows) == pytest.approx(total)
    assert sum(row.calls for row in found.rows) == len(timeline.steps) + 1
    assert sum(asdict(split).values()) == pytest.approx(1)
    assert min(asdict(split).values()) > 0
    native = sum(row.share for row in found.rows if row.kernel == "native")
    assert split.native == pytest.approx(native)
    rest = next(row.share for row in found.rows if row.group == "interpreter")
    assert split.between_steps == pytest.approx(rest)
    layers = sum(row.seconds for row in found.rows if row.operator == "fpc.linear")
    assert sum(row.seconds for row in found.roofline) == pytest.approx(layers)
    data = json.loads(json.dumps(found.to_json()))
    assert (data["program"], data["split"]) == (timeline.program, asdict(split))
    assert f"{split.native:.1%} in native kernels" in str(found)


def require_spans_in_order(found: Profile) -> None:
    spans, calls = found.timeline.spans, found.timeline.calls
    assert (spans[..., 1] >= spans[..., 0]).all()
    for row, call in zip(spans.tolist(), calls.tolist(), strict=True):
        edges = [call[0], *(mark for pair in row for mark in pair), call[1]]
        assert all(a <= b + 1e-12 for a, b in pairwise(edges))


def test_a_small_model_as_a_program() -> None:
    found = measured(mlp(), [X])
    require_consistent(found)
    require_spans_in_order(found)
    assert found.timeline.program
    assert "between steps (Python); calls run as a program" in str(found)
    assert [row.call.layer for row in found.roofline] == ["up", "down", "up", "down"]
    rows = {(row.operator, row.kernel, row.layers): row.calls for row in found.rows}
    assert rows == {
        ("fpc.quantize", "native", "up"): 2,
        ("fpc.quantize", "native", "down"): 2,
        ("fpc.linear", "native", "up"): 2,
        ("fpc.linear", "native", "down"): 2,
        ("aten.add.Tensor", "native", ""): 1,
        ("aten.add.Tensor", "torch", ""): 1,  # the counter plus a number
        ("aten.gelu.default", "torch", ""): 2,
        ("aten.linear.default", "torch", "head"): 1,
        ("everything else", "", ""): 1,
    }


def test_a_decoder_as_a_program(decoder: Executor) -> None:
    first: list[dict[str, Tensor]] = []
    original = Executor.run_leaves

    def spy(self: Executor, *args: Any, **kwargs: Any) -> list[Any]:
        first.append({name: state.clone() for name, state in self._state.items()})
        return original(self, *args, **kwargs)

    found = measured(decoder, TOKEN, run_leaves=spy)
    require_consistent(found)
    require_spans_in_order(found)
    assert found.timeline.program
    assert all(
        torch.equal(s[n], decoder._initial[n].value) for s in first for n in decoder._initial
    )
    kernels = {(row.operator, row.kernel) for row in found.rows}
    assert ("fpc.fused_quantize", "native") in kernels
    assert ("aten.index_copy.default", "native") in kernels
    assert not {("fpc.fused_quantize", "reference"), ("fpc.linear", "cpu")} & kernels


def test_all_measured_calls_run_the_program() -> None:
    ran: list[bool] = []
    original = Program.run

    def spy(self: Program, values: dict[str, Any], times: Any = None) -> None:
        ran.append(times is not None)
        original(self, values, times)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "run", spy)
        found = measured(mlp(), [X])
    # The first call and the second one make the program.
    timed = len(found.timeline.calls)
    assert ran == [False] * (WARM_UP_CALLS - 1 + found.latency.calls) + [True] * timed


def test_operations_of_a_step_are_one_step(decoder: Executor) -> None:
    executor = decoder.fresh()
    for _ in range(3):
        executor.run_leaves(TOKEN)
    program = executor.program(TOKEN)
    assert program is not None
    operations = [i for item in program.items if isinstance(item, Segment) for i in item.steps]
    by_torch = [item.index for item in program.items if isinstance(item, TorchStep)]
    times: list[tuple[int, int]] = []
    executor.run_leaves(TOKEN, times=times)
    assert sorted(index for index, _ in times) == sorted(operations + by_torch)
    assert len({*operations}) < len(operations)  # A concatenation is several copies.
    found = measured(decoder, TOKEN)
    steps = [decoder.plan.steps[index] for index in dict.fromkeys(index for index, _ in times)]
    assert found.timeline.steps == tuple(steps)


def test_the_time_of_a_step_of_torch_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = mlp()
    for _ in range(3):
        executor.run_leaves([X])
    program = executor.program([X])
    assert program is not None
    slow = next(item for item in program.items if isinstance(item, TorchStep))
    original = slow.instruction.function

    def sleeping(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.01)
        return original(*args, **kwargs)

    monkeypatch.setitem(vars(slow.instruction), "function", sleeping)
    times: list[tuple[int, int]] = []
    before = time.perf_counter_ns()
    executor.run_leaves([X], times=times)
    call = time.perf_counter_ns() - before
    spent = dict(times)
    assert spent[slow.index] >= 10_000_000
    assert sum(spent.values()) < call


def test_steps_run_one_by_one_where_there_is_no_program(decoder: Executor) -> None:
    found = measured(decoder, TOKEN, _new_programs=lambda self: None)
    require_consistent(found)
    require_spans_in_order(found)
    assert not found.timeline.program
    assert found.timeline.steps == decoder.plan.steps
    kernels = {(row.operator, row.kernel) for row in found.rows}
    native = {operator for operator, kernel in kernels if kernel == "native"}
    assert native == {"fpc.linear", "fpc.quantize", "fpc.fused_quantize"}


def test_a_target_without_kernels_runs_the_reference() -> None:
    found = measured(mlp("reference"), [X])
    assert not found.timeline.program
    assert found.timeline.split().native == 0
    kernels = {row.kernel for row in found.rows if row.operator.startswith("fpc.")}
    assert kernels == {"reference"}


def test_a_program_that_does_not_fit_the_values_is_not_timed() -> None:
    executor = mlp()
    refused: list[int] = []

    def run(self: Program, values: dict[str, Any], times: Any = None) -> None:
        if times is None:
            original(self, values)
            return
        times.append((0, 1))
        refused.append(len(times))
        raise ChangedError

    original = Program.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "run", run)
        found = measured(executor, [X])
    assert refused == [1]
    assert not found.timeline.program
    assert found.timeline.steps == executor.plan.steps


class Attention(nn.Module):
    """One layer, then attention of as many queries as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.layer(x).view(1, -1, 4, 16).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads)


@pytest.mark.parametrize(("rows", "kernel"), [(3, "native"), (40, "torch")])
@pytest.mark.parametrize("programs", [True, False])
def test_attention_of_many_queries_is_of_torch(rows: int, kernel: str, programs: bool) -> None:
    x = normal(rows, 64)
    artifact = fpcompiler.compile(Attention().eval(), "w4a6", example_inputs=(x,)).artifact
    executor = Executor(artifact.plan, artifact.tensors)
    patches = {} if programs else {"_new_programs": lambda self: None}
    found = measured(executor, [x], **patches)
    assert found.timeline.program is programs
    name = "aten.scaled_dot_product_attention.default"
    assert [row.kernel for row in found.rows if row.operator == name] == [kernel]
