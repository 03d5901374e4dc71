from dataclasses import replace

import pytest
import torch

from fpcompiler.artifact import Golden
from fpcompiler.errors import OptionError
from fpcompiler.plan import LayerRow, Parameter, Placeholder, Plan, Signature, Symbol
from fpcompiler.runtime.example_call import example_call
from fpcompiler.tree import LEAF
from tests.plans import aten, value

TABLE = LayerRow("embed", "embedding", (50, 8), "float32", "", "aten", "", 1600, 1600, False)
PLAN = Plan(
    Signature((Parameter("ids", LEAF), Parameter("position", LEAF), Parameter("x", LEAF)), LEAF),
    (
        Placeholder("ids", "int64", ("b", "t")),
        Placeholder("position", "int64", ("t",)),
        Placeholder("x", "float32", ("b", 3)),
    ),
    (aten("embedding.default", value("table"), value("ids"), out="y", layer="embed"),),
    ("y",),
    symbols={"b": Symbol(1, 8), "t": Symbol(1, None)},
    constants={"table": "table"},
    layers=(TABLE,),
)
RECORDED = (
    torch.tensor([[5, 9, 2, 7], [1, 1, 4, 3]]),
    torch.arange(2, 6),
    torch.tensor([[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]]),
)
GOLDEN = (Golden(RECORDED, ()),)


def test_the_recorded_call_is_taken_as_it_is():
    assert all(map(torch.equal, example_call(PLAN, GOLDEN), RECORDED))


def test_values_repeat_and_positions_go_on_counting():
    ids, position, x = example_call(PLAN, GOLDEN, {"b": 3, "t": 6})
    assert ids.tolist() == [[5, 9, 2, 7, 5, 9], [1, 1, 4, 3, 1, 1], [5, 9, 2, 7, 5, 9]]
    assert position.tolist() == [2, 3, 4, 5, 6, 7]
    assert x.tolist() == [[0.5, 1.5, 2.5], [3.5, 4.5, 5.5], [0.5, 1.5, 2.5]]
    ids, position, x = example_call(PLAN, GOLDEN, {"b": 1, "t": 1})
    assert (ids.tolist(), position.tolist(), x.tolist()) == ([[5]], [2], [[0.5, 1.5, 2.5]])


def test_without_a_recorded_call_one_is_made_up():
    ids, position, x = example_call(PLAN, (), {"t": 40})
    assert ids.shape == (8, 40)  # The range of b ends at 8.
    assert ids.dtype == torch.int64
    assert ids.min() >= 0
    assert ids.max() < 50
    assert ids.unique().numel() > 40  # Rows all over the table.
    assert position.tolist() == [0] * 40
    assert (x.shape, x.dtype) == ((8, 3), torch.float32)
    assert 0.5 < x.std() < 1.5
    assert all(map(torch.equal, example_call(PLAN, (), {"t": 40}), (ids, position, x)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"s": 3}, r"no size 's' that varies; it has b \(axis 0 of ids\), t \(axis 1 of ids\)"),
        ({"b": 9}, "b must be from 1 to 8, not 9"),
        ({"t": 0}, "t must be at least 1, not 0"),
    ],
)
def test_sizes_that_the_model_does_not_take_are_refused(sizes, message):
    with pytest.raises(OptionError, match=message):
        example_call(PLAN, GOLDEN, sizes)


def test_a_size_that_depends_on_others_must_be_given():
    placeholders = (*PLAN.placeholders[:2], Placeholder("x", "float32", ("2*b", 3)))
    plan = replace(PLAN, placeholders=placeholders)
    assert torch.equal(example_call(plan, GOLDEN)[2], RECORDED[2])
    for golden, sizes in ((GOLDEN, {"b": 3}), ((), {})):
        with pytest.raises(OptionError, match=r"the size 2\*b, which does not tell a number"):
            example_call(plan, golden, sizes)
