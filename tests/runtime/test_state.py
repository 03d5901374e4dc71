"""What states begin as, and which writes to a cache may happen in place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fpcompiler.plan import Parameter, Placeholder, Plan, Signature, Step
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.state import Initial, in_place_updates
from fpcompiler.tree import LEAF
from tests.plans import aten, value

WRITE = aten("index_copy.default", value("cache"), 0, value("index"), value("x"), out="new")
READ = aten("mul.Scalar", value("new"), 2.0, out="y")

LARGE = 1 << 19


def plan(
    *steps: Step, stores: tuple[tuple[str, str], ...] = (("new", "cache"),), out: str = "y"
) -> Plan:
    return Plan(
        signature=Signature((Parameter("x", LEAF), Parameter("index", LEAF)), LEAF),
        placeholders=(Placeholder("x", "float32", (1, 3)), Placeholder("index", "int64", (1,))),
        steps=steps,
        outputs=(out,),
        state={"cache": "cache"},
        stores=stores,
    )


def executor(made: Plan) -> Executor:
    return Executor(made, {"cache": torch.zeros(4, 3)})


@pytest.mark.parametrize(
    ("made", "steps"),
    [
        (plan(WRITE, READ), {0}),
        (plan(aten("neg.default", value("x"), out="z"), WRITE, READ), {1}),
        (plan(aten("neg.default", value("cache"), out="z"), WRITE, READ), set()),
        (plan(WRITE, READ, aten("neg.default", value("cache"), out="z")), set()),
        (plan(WRITE, READ, stores=()), set()),
        (plan(WRITE, READ, out="cache"), set()),
        (plan(WRITE, READ, stores=(("y", "cache"),)), set()),
    ],
    ids=["only", "second", "read before", "read after", "not stored", "returned", "other stored"],
)
def test_a_cache_is_written_in_place_where_nothing_else_reads_it(
    made: Plan, steps: set[int]
) -> None:
    assert in_place_updates(made) == steps


def test_results_are_those_of_a_copy() -> None:
    first = executor(plan(WRITE, READ))
    second = executor(plan(WRITE, READ, aten("neg.default", value("cache"), out="z")))
    for row in (2, 0, 2):
        x = torch.full((1, 3), float(row + 1))
        assert torch.equal(first.run(x, torch.tensor([row])), second.run(x, torch.tensor([row])))
        assert torch.equal(first._state["cache"], second._state["cache"])


def test_a_result_that_is_the_state_is_a_copy() -> None:
    one = executor(replace(plan(WRITE, READ), outputs=("new",)))
    result = one.run(torch.ones(1, 3), torch.tensor([1]))
    one.run(2 * torch.ones(1, 3), torch.tensor([1]))
    assert result[1].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("initial_value", "zeros"),
    [
        (torch.zeros(LARGE), True),
        (torch.zeros(2, LARGE, dtype=torch.uint8), True),
        (torch.full((LARGE,), -0.0), False),
        (torch.arange(LARGE), False),
        (torch.zeros(3), False),  # copied as it is
    ],
)
def test_states_are_their_own_and_come_back(initial_value: torch.Tensor, zeros: bool) -> None:
    initial = Initial(initial_value.clone(), torch.device("cpu"))
    assert initial.zeros is zeros
    first, second = initial.new(), initial.new()
    first.add_(1)
    for state in (second, initial.value):
        assert torch.equal(state.view(torch.uint8), initial_value.view(torch.uint8))
    initial.restore(first)
    assert first.dtype == initial_value.dtype
    assert torch.equal(first.view(torch.uint8), initial_value.view(torch.uint8))
