"""Instances as JSON, and back."""

import copy
import json

import pytest

from fpcompiler.codegen.cutlass.record import describe, parse_instance
from fpcompiler.codegen.problem import Activation, Epilogue, OutputType, Rows
from fpcompiler.errors import ArtifactError
from tests.codegen.problems import NVFP4, W4A6_ROW, instance_of, problem

INSTANCES = [
    instance_of(problem(NVFP4, "sm_100a", Rows.DECODE)),
    instance_of(problem(W4A6_ROW, "sm_90a", output=OutputType.F32)),
    instance_of(
        problem(W4A6_ROW, "sm_120f", epilogue=Epilogue(activation=Activation.RELU, residual=True))
    ),
]


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda instance: instance.name)
def test_there_and_back(instance) -> None:
    text = json.dumps(describe(instance))
    assert parse_instance(json.loads(text)) == instance


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("arch",), 'sm_90a"); system("true'),
        (("kind",), "bf16"),
        (("kind",), ["mxf4"]),
        (("a",), "f6E1M4FN"),
        (("b",), "float; int x"),
        (("b",), {}),
        (("scale",), "block16:f8E8M0FNU"),
        (("output",), "f64"),
        (("activation",), "tanh"),
        (("residual",), 1),
        (("residual",), "false; int x"),
        (("tile",), [128, 128, 128]),
        (("tile", "m"), "128"),
        (("tile", "m"), True),
        (("tile", "n"), -128),
        (("tile", "k"), 2**40),
        (("tile", "cluster"), [1, 1, 1]),
        (("tile", "cluster"), ["1", 1]),
        (("tile", "n"), 96),
        (("tile", "sms"), 2),
        (("tile", "sms"), True),
        (("scale",), "none"),
        (("tile", "pingpong"), 0),
        (("tile", "more"), 1),
        (("more",), 1),
    ],
)
def test_foreign_values_are_refused(path, value) -> None:
    values = copy.deepcopy(describe(INSTANCES[0]))
    holder = values if len(path) == 1 else values[path[0]]
    holder[path[-1]] = value
    with pytest.raises(ArtifactError, match="describes no kernel of this version"):
        parse_instance(values)


@pytest.mark.parametrize("values", [None, [], "gemm", {}])
def test_something_else_is_refused(values) -> None:
    with pytest.raises(ArtifactError, match="it needs a, activation, arch"):
        parse_instance(values)
