import copy
import json

import pytest

from fpcompiler.errors import ArtifactError
from fpcompiler.plan import (
    PLAN_VERSION,
    LayerRow,
    Parameter,
    Placeholder,
    Plan,
    Signature,
    Step,
    Symbol,
    used_values,
)
from fpcompiler.tree import LEAF

STEPS = (
    Step("aten.add.Tensor", ({"v": "x"}, {"v": "w"}), ("y",), {"alpha": 2}, "layers.0"),
    Step("py.mul", (2, {"f": "-inf"}), ("n",)),
    Step("aten.cat.default", ([{"v": "y"}, {"v": "cache"}], 0), ("z",)),
)
PLAN = Plan(
    Signature((Parameter("x", LEAF), Parameter("mask")), LEAF, {"use_cache": False}),
    (Placeholder("x", "float32", ("s0", 4, "2*s0")),),
    STEPS,
    ("z",),
    {"s0": Symbol(1, None)},
    {"w": "layers.0.weight"},
    {"cache": "cache"},
    (("y", "cache"),),
    (LayerRow("layers.0", "linear", (3, 4), "f32", "f32", "aten", "skip", 48, 48, False, "*"),),
)


def as_json() -> dict:
    return json.loads(json.dumps(PLAN.to_json()))


def test_a_plan_survives_json():
    assert Plan.from_json(as_json()).to_json() == PLAN.to_json()
    assert Plan.from_json(as_json()).steps[0] == STEPS[0]


def test_used_values_finds_them_at_every_depth():
    argument = [{"v": "a"}, [1, [{"v": "b"}]], {"dtype": "float32"}, "c"]
    assert list(used_values(argument)) == ["a", "b"]


def edited(change) -> dict:
    data = copy.deepcopy(as_json())
    change(data)
    return data


BAD = {
    "no version": lambda d: d.pop("version"),
    "reads version": lambda d: d.update(version=PLAN_VERSION + 1),
    "should have the fields": lambda d: d.update(code="import os"),
    "expected a list": lambda d: d.update(steps={}),
    "symbols: expected an object": lambda d: d.update(symbols=[]),
    "operator 'os.system'": lambda d: d["steps"][0].update(op="os.system"),
    "operator 'aten.add'": lambda d: d["steps"][0].update(op="aten.add"),
    r"reads \['nothing'\] before": lambda d: d["steps"][0]["args"].append({"v": "nothing"}),
    "before any step defines it": lambda d: d["steps"].reverse(),
    r"defines \['x'\] again": lambda d: d["steps"][0].update(outs=["x"]),
    "distinct result names": lambda d: d["steps"][1].update(outs=["a", "a"]),
    "needs distinct result": lambda d: d["steps"][1].update(outs=[]),
    "'far' is defined by no step": lambda d: d.update(outputs=["far"]),
    "2 outputs for 1": lambda d: d["outputs"].append("y"),
    "placeholders for 1 input": lambda d: d["placeholders"].append(d["placeholders"][0]),
    "have the same name": lambda d: d["constants"].update(x="x"),
    "two stores into one state": lambda d: d["stores"].append(["z", "cache"]),
    "no state": lambda d: d.update(stores=[["z", "w"]]),
    "no pair of names": lambda d: d.update(stores=[["z"]]),
    "unknown dtype 'object'": lambda d: d["placeholders"][0].update(dtype="object"),
    "unknown symbol 's9'": lambda d: d["placeholders"][0].update(shape=["s9"]),
    "has the size -1": lambda d: d["placeholders"][0].update(shape=[-1]),
    "shape of 'x' is": lambda d: d["placeholders"][0].update(shape=[1.5]),
    "has the range 3..2": lambda d: d["symbols"].update(s0={"min": 3, "max": 2}),
    "has the range True": lambda d: d["symbols"].update(s0={"min": True, "max": 2}),
    "not a description of nested": lambda d: d["signature"].update(outputs={"t": "call"}),
    "two parameters": lambda d: d["signature"]["parameters"].append({"name": "x", "spec": None}),
    "fixed argument is no": lambda d: d["signature"]["fixed"].update(a=[1]),
    "row 'layers.0' has a size": lambda d: d["layers"][0].update(bytes_after=-1),
    "does not say whether": lambda d: d["layers"][0].update(quantized=1),
    "reason of row": lambda d: d["layers"][0].update(reason=None),
    "neither name nor number": lambda d: d.update(outputs=[["z"]]),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_a_malformed_plan_is_refused(message):
    with pytest.raises(ArtifactError, match=message):
        Plan.from_json(edited(BAD[message]))


@pytest.mark.parametrize(
    "argument",
    [
        {"eval": "1"},
        {"v": 1},
        {"v": "x", "dtype": "float32"},
        {},
        float("inf"),
        2**63,
        [[[[[[[[[[1]]]]]]]]]],
    ],
)
def test_a_malformed_argument_is_refused(argument):
    with pytest.raises(ArtifactError, match="an argument of"):
        Plan.from_json(edited(lambda d: d["steps"][1]["args"].append(argument)))


@pytest.mark.parametrize("data", [None, [], 1, "plan", {"version": True}])
def test_other_json_is_refused(data):
    with pytest.raises(ArtifactError, match="no version number"):
        Plan.from_json(data)
