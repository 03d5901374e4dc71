import json
import math

import pytest
import torch
from torch import Tensor, nn

from fpcompiler.errors import OptionError, RunError
from fpcompiler.numerics import cosine, max_error, sqnr_db
from fpcompiler.plan import LayerRow, Parameter, Placeholder, Plan, Signature, Step, Symbol
from fpcompiler.runtime.compare import Distance, call_arguments, compare
from fpcompiler.runtime.executor import Executor
from fpcompiler.tree import LEAF
from tests.plans import Mlp, aten, mlp_artifact, value


@pytest.fixture(scope="module")
def eager() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


@pytest.fixture(scope="module")
def executor(eager) -> Executor:
    artifact = mlp_artifact(eager)
    return Executor(artifact.plan, artifact.tensors)


def recorded(eager: Mlp, executor: Executor, x: Tensor, name: str) -> tuple[list, list]:
    """Return what a layer gives in the eager and in the compiled model, call by call."""
    ours: list[Tensor] = []
    handle = getattr(eager, name).register_forward_hook(lambda m, a, y: ours.append(y.detach()))
    eager(x)
    handle.remove()
    theirs: list[Tensor] = []

    def observe(step: Step, tensor: Tensor) -> None:
        if step.layer == name:
            theirs.append(tensor)

    executor.fresh().observed(observe, x)
    return ours, theirs


def test_measures_are_those_of_all_calls_and_batches_together(eager, executor):
    batches = [torch.randn(3, 64), 100 * torch.randn(1, 64)]
    table = compare(executor, eager, batches)
    rows = {row.name: row for row in table.rows}
    assert list(rows) == ["up", "down", "head", "logits", "hidden[0]"]
    for name, calls in (("up", 4), ("down", 4), ("head", 2)):
        pairs = [recorded(eager, executor, x, name) for x in batches]
        ours = torch.cat([t.flatten() for pair in pairs for t in pair[0]])
        theirs = torch.cat([t.flatten() for pair in pairs for t in pair[1]])
        assert rows[name].calls == calls
        assert rows[name].sqnr_db == pytest.approx(sqnr_db(ours, theirs))
        assert rows[name].cosine == pytest.approx(cosine(ours, theirs))
        assert rows[name].max_error == max_error(ours, theirs)
        assert rows[name].sqnr_db > 10


def test_outputs_are_compared(eager, executor):
    x = torch.randn(2, 64)
    table = compare(executor, eager, [x])
    expected = sqnr_db(eager(x)["logits"], executor.fresh().run(x)["logits"])
    row = next(row for row in table.rows if row.name == "logits")
    assert (row.kind, row.calls, row.reason) == ("output", 1, "")
    assert row.sqnr_db == pytest.approx(expected)


def test_batches_are_tensors_tuples_or_dictionaries(eager, executor):
    x = torch.randn(2, 64)
    tables = [compare(executor, eager, [b]) for b in (x, (x,), [x, None], {"x": x, "mask": None})]
    assert all(table == tables[0] for table in tables)
    assert call_arguments([1, 2]) == ((1, 2), {})
    with pytest.raises(OptionError, match="a batch is a tensor, a tuple of arguments or a dict"):
        compare(executor, eager, ["text"])
    with pytest.raises(OptionError, match="got no batches"):
        compare(executor, eager, [])
    with pytest.raises(RunError, match="dimension 1 must be 64"):
        compare(executor, FirstArgument(), [torch.ones(2, 3)])


def test_the_model_is_evaluated_and_gets_back_its_mode_and_no_hooks(eager, executor):
    model = nn.Module()
    model.dropout = nn.Dropout()
    model.frozen = nn.Dropout().eval()
    model.inner = eager

    def forward(x: Tensor, use_cache: bool) -> dict:
        assert use_cache is False  # As the compiled model has it.
        assert not torch.is_grad_enabled()
        return eager(model.dropout(x))

    model.forward = forward
    tables = [compare(executor, model, [torch.ones(2, 64)]) for _ in range(2)]
    assert tables[0] == tables[1]
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    assert not eager.up._forward_hooks


def test_a_model_of_another_result_is_refused(executor):
    with pytest.raises(RunError, match=r"is a tensor of shape \[2, 64\], which does not have the"):
        compare(executor, FirstArgument(), [torch.ones(2, 64)])


class FirstArgument(nn.Module):
    def forward(self, x: Tensor, use_cache: bool = False) -> Tensor:
        return x


class Odd(nn.Module):
    """Layers that cannot be compared, each for another reason, and two that can."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.folded = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.narrow = nn.Linear(4, 4)
        self.inlined = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(x).relu_()
        y = self.twice(self.twice(self.folded(y)))
        return self.inlined(self.narrow(y))


def odd_executor(model: Odd) -> Executor:
    def linear(x: str, out: str, layer: str) -> Step:
        return aten("linear.default", value(x), value("w"), out=out, layer=layer)

    steps = (
        linear("x", "a", "plain"),
        aten("relu.default", value("a"), out="b"),
        aten("reshape.default", value("b"), [-1, 4], out="c", layer="folded"),
        linear("c", "d", "folded"),
        linear("d", "e", "twice"),
        aten("reshape.default", value("e"), [1, -1, 4], out="f", layer="twice"),
        linear("f", "g", "narrow"),
        aten("slice.Tensor", value("g"), 2, 0, 2, out="h", layer="narrow"),
        linear("g", "y", "elsewhere"),
    )
    names = ("plain", "folded", "twice", "narrow", "inlined", "unused", "gone")
    kinds = ("f32", "f32", "reference", "", 64, 64, False)
    rows = tuple(LayerRow(name, "linear", (4, 4), *kinds) for name in names)
    plan = Plan(
        Signature((Parameter("x", LEAF),), LEAF),
        (Placeholder("x", "float32", (1, "s0", 4)),),
        steps,
        ("y",),
        {"s0": Symbol(1, 8)},
        {"w": "w"},
        layers=rows,
    )
    for module in model.children():
        module.bias.data.zero_()
        module.weight.data = torch.eye(4)
    return Executor(plan, {"w": torch.eye(4)})


def test_layers_that_cannot_be_compared_say_why():
    model = Odd()
    table = compare(odd_executor(model), model, [torch.randn(1, 3, 4)])
    rows = {row.name: row for row in table.rows}
    # In place changes after a layer, and a result with its axes folded, make no difference.
    assert rows["plain"].sqnr_db == rows["folded"].sqnr_db == math.inf
    reasons = {name: row.reason for name, row in rows.items() if row.reason}
    assert reasons == {
        "twice": "called 2 times in the model, 1 compiled",
        "narrow": "shapes differ: [1, 3, 4], compiled [1, 3, 2]",
        "inlined": "no step of the compiled program computes it alone",
        "unused": "no step of the compiled program computes it alone",
        "gone": "the model has no module of that name",
    }
    assert all(rows[name].sqnr_db is None and rows[name].calls == 0 for name in reasons)
    text = str(table)
    assert "shapes differ: [1, 3, 4], compiled [1, 3, 2]" in text
    assert "inf" in text
    data = json.loads(json.dumps(table.to_json(), allow_nan=False))
    assert data["rows"][0] == {
        "name": "plain", "kind": "layer", "sqnr_db": "inf", "cosine": pytest.approx(1),
        "max_error": 0.0, "calls": 1, "reason": "",
    }  # fmt: skip


def distance(a: Tensor, b: Tensor) -> Distance:
    d = Distance()
    d.add(a, b)
    return d


def test_distances_are_defined_for_all_tensors():
    zero, one = torch.zeros(3), torch.ones(3)
    assert distance(zero, zero).sqnr_db == math.inf
    assert distance(zero, one).sqnr_db == -math.inf
    assert distance(zero, zero).cosine == 1.0
    assert distance(zero, one).cosine == 0.0
    assert distance(torch.empty(0), torch.empty(0)).sqnr_db == math.inf
    assert math.isnan(distance(one, one * math.nan).sqnr_db)
    unknown = distance(one, one * math.nan)
    unknown.add(one, one)
    assert math.isnan(unknown.worst)
    assert distance(one, torch.tensor([1.0, 1.0, math.inf])).sqnr_db == -math.inf
    masked = torch.tensor([1.0, -math.inf])
    assert distance(masked, masked).sqnr_db == math.inf
    assert distance(masked, torch.tensor([1.5, -math.inf])).worst == 0.5


def test_complex_and_whole_numbers_are_compared_too():
    a = torch.tensor([1 + 2j])
    assert distance(a, a + 2j).worst == 2.0
    assert distance(torch.tensor([True]), torch.tensor([False])).worst == 1.0


def test_large_tensors_are_summed_in_pieces(monkeypatch):
    a, b = torch.randn(1000), torch.randn(1000)
    whole = distance(a, b)
    monkeypatch.setattr("fpcompiler.runtime.compare._PIECE", 64)
    assert distance(a, b).sqnr_db == pytest.approx(whole.sqnr_db)
    assert distance(a, b).cosine == pytest.approx(whole.cosine)
