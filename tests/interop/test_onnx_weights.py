"""Weights of every format and scale: what a graph computes from its constants, in both styles."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from fpcompiler.errors import ExportError
from fpcompiler.formats import FORMATS
from fpcompiler.interop.onnx.portable import Portable
from fpcompiler.interop.onnx.standard import Standard
from fpcompiler.interop.onnx.types import container
from fpcompiler.numerics import dequantize_packed, quantize_packed
from fpcompiler.operand import Operand
from fpcompiler.runtime.reference import elements
from tests.interop.onnx_graphs import finished, on_onnxruntime, on_reference

ELEMENTS = [spec.name for spec in FORMATS.values() if spec.signed]
LEVELS = ["", "row:f32", "tensor:f32/block16:f8E4M3FN", "row:f32/block32:f8E8M0FNU", "block64:f32"]
TYPES = {
    "f4E2M1FN": ("FLOAT4E2M1", 23), "f4E1M2FN": ("INT4", 21), "f4E3M0FN": ("FLOAT8E4M3FN", 21),
    "f6E2M3FN": ("FLOAT6E2M3", 28), "f6E3M2FN": ("FLOAT6E3M2", 28), "f6E1M4FN": ("INT8", 21),
    "f6E4M1FN": ("FLOAT8E4M3FN", 21), "f8E3M4": ("INT16", 21), "f8E3M4FN": ("INT16", 21),
    "f8E1M6FN": ("INT8", 21), "f8E2M5FN": ("INT16", 21), "f8E4M3FN": ("FLOAT8E4M3FN", 21),
    "f8E5M2": ("FLOAT8E5M2", 21),
}  # fmt: skip
"""The narrowest type of ONNX that holds each format; none holds E5M0."""


def model_of(operand: Operand, weight: torch.Tensor, style) -> tuple[ir.Model, np.ndarray]:
    """Return a model without inputs whose result is a weight, and what it should be."""
    n, k = weight.shape
    packed, scales = quantize_packed(weight, operand)
    values = [ir.Value(name=f"layer.weight.{i}") for i in range(1 + len(scales))]
    for value, tensor in zip(values, (packed, *scales), strict=True):
        value.const_value = ir.tensor(tensor.numpy(), name=value.name)
    attributes = {"operand": str(operand), "layer": "layer", "k": k}
    count = 1 + (operand.outer is not None)
    node = ir.node("Weight", values, attributes, domain="fpc", num_outputs=count)
    node.outputs[0].name, node.outputs[0].shape = "y", ir.Shape([n, k])
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [], node.outputs[:1], nodes=[node], initializers=values,
        opset_imports={"": 18, "fpc": 1},
    )  # fmt: skip
    inner = (scales[-1],) if operand.block else ()
    expected = dequantize_packed(packed, inner, elements(operand), k).numpy()
    return finished(graph, style), expected


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", ELEMENTS)
def test_a_weight_is_computed_bit_for_bit(name: str, levels: str) -> None:
    operand = Operand.parse(f"{name}@{levels}" if levels else name)
    for k in (96, 45):
        weight = torch.randn(5, k, generator=torch.Generator().manual_seed(k))
        weight[1] *= 100
        weight[2, :32] = 0
        model, expected = model_of(operand, weight, Portable())
        np.testing.assert_array_equal(on_onnxruntime(model)[0], expected)
        if name == "f6E5M0FN":
            continue
        model, expected = model_of(operand, weight, Standard(28))
        np.testing.assert_array_equal(on_reference(model)[0], expected)


@pytest.mark.parametrize("name", TYPES)
def test_the_type_of_a_format_is_the_narrowest_that_holds_it(name: str) -> None:
    held = container(FORMATS[name], 28, "a.layer")
    assert (held.dtype.name, held.opset) == TYPES[name]


def test_a_format_that_no_type_holds_is_refused_by_layer() -> None:
    assert {*TYPES, "f6E5M0FN"} == {*ELEMENTS}
    with pytest.raises(ExportError) as caught:
        container(FORMATS["f6E5M0FN"], 28, "a.layer")
    assert str(caught.value) == (
        "layer 'a.layer': no type of ONNX up to opset 28 holds every number of f6E5M0FN. Export to "
        "onnx-portable, or compile the layer with another format."
    )


def test_below_their_opset_formats_are_in_wider_types() -> None:
    assert container(FORMATS["f4E2M1FN"], 22, "").dtype == ir.DataType.FLOAT8E4M3FN
    assert container(FORMATS["f6E3M2FN"], 27, "").dtype == ir.DataType.FLOAT8E4M3FN
    with pytest.raises(ExportError, match="up to opset 20"):
        container(FORMATS["f4E2M1FN"], 20, "")
