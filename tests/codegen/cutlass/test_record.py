"""Instances as JSON, and back."""

import copy
import json
from dataclasses import replace

import pytest

from fpcompiler.codegen.cutlass.quantized import QuantizedOutput
from fpcompiler.codegen.cutlass.record import describe, parse_instance
from fpcompiler.codegen.problem import Activation, Epilogue, OutputType, Rows
from fpcompiler.errors import ArtifactError
from tests.codegen.problems import NVFP4, W4A6, W4A6_ROW, instance_of, problem

INSTANCES = [
    instance_of(problem(NVFP4, "sm_100a", Rows.DECODE)),
    instance_of(problem(W4A6_ROW, "sm_90a", output=OutputType.F32)),
    instance_of(
        problem(W4A6_ROW, "sm_120f", epilogue=Epilogue(activation=Activation.RELU, residual=True))
    ),
    replace(
        instance_of(problem(W4A6, "sm_120a")),
        quantized=QuantizedOutput("f6E2M3FN@block32:f8E8M0FNU", "gelu"),
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


def test_what_is_not_quantized_is_described_as_before() -> None:
    assert "quantized" not in describe(INSTANCES[0])


@pytest.mark.parametrize(
    "quantized",
    [
        {"operand": "f6E2M3FN@block32:f8E8M0FNU"},
        {"operand": "f6E2M3FN@block32:f8E8M0FNU", "producer": 0},
        {"operand": "e2m3@block32:e8m0", "producer": ""},
        {"operand": "f6E2M3FN@block32:f8E8M0FNU; x", "producer": ""},
        {"operand": "f6E2M3FN@token:f32/block32:f8E8M0FNU", "producer": ""},
        {"operand": "f6E2M3FN@block16:f8E8M0FNU", "producer": ""},
        {"operand": "f4E2M1FN@block16:f8E4M3FN", "producer": ""},
        {"operand": "f6E1M4FN@block32:f8E8M0FNU", "producer": ""},
        {"operand": "f6E2M3FN@block32:f8E8M0FNU", "producer": "rms_norm"},
        {"operand": "f6E2M3FN@block32:f8E8M0FNU", "producer": "silu_mul"},
        "f6E2M3FN@block32:f8E8M0FNU",
    ],
    ids=str,
)
def test_outputs_that_no_kernel_quantizes_are_refused(quantized) -> None:
    values = {**describe(INSTANCES[3]), "quantized": quantized}
    with pytest.raises(ArtifactError, match="describes no kernel of this version"):
        parse_instance(values)


@pytest.mark.parametrize("index", [1, 2])
def test_kernels_for_hopper_and_with_a_residual_quantize_nothing(index) -> None:
    values = {**describe(INSTANCES[index]), "quantized": describe(INSTANCES[3])["quantized"]}
    with pytest.raises(ArtifactError, match="none quantizes its output so"):
        parse_instance(values)


@pytest.mark.parametrize("values", [None, [], "gemm", {}])
def test_something_else_is_refused(values) -> None:
    with pytest.raises(ArtifactError, match="it needs a, activation, arch"):
        parse_instance(values)
