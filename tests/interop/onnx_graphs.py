"""Small ONNX models with one symbol each, and what runs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from fpcompiler.interop.onnx.lower import lower
from fpcompiler.interop.onnx.opsets import needed_opset, set_opset
from fpcompiler.interop.onnx.styles import Style
from fpcompiler.operand import Operand
from fpcompiler.runtime.ops import scale_shape

CODES = ir.TensorType(ir.DataType.UINT8)
VALUES = ir.TensorType(ir.DataType.FLOAT)


def quantizer(
    operand: Operand, shape: Sequence[int | str], style: Style, *, codes: bool
) -> ir.Model:
    """Return a model from values to dequantized ones, and to codes and scales if wanted."""
    sizes = ir.Shape(list(shape))
    x = ir.val("x", ir.DataType.FLOAT, sizes)
    attributes = {"operand": str(operand), "layer": "a.layer"}
    count = 1 + len(operand.levels)
    node = ir.node("Quantize", [x], attributes, domain="fpc", num_outputs=count)
    for index, value in enumerate(node.outputs):
        level = operand.levels[index - 1] if index else None
        value.name, value.shape = f"part{index}", sizes if level is None else None
        value.type = VALUES if level and level.is_real else CODES
        if level is not None:
            value.shape = ir.Shape(
                [*(s if isinstance(s, int) else None for s in scale_shape(list(shape), level))]
            )
    back = ir.node("Dequantize", node.outputs, attributes, domain="fpc", num_outputs=1)
    y = back.outputs[0]
    y.name, y.shape, y.type = "y", sizes, VALUES
    results = [y, *node.outputs] if codes else [y]
    return finished(
        ir.Graph([x], results, nodes=[node, back], opset_imports={"": 18, "fpc": 1}), style
    )


def quantizer_within(operand: Operand, outer: float, k: int, style: Style) -> ir.Model:
    """Return a model from ``[n, 3, k]`` to values, codes and scales within one of the tensor."""
    sizes = ir.Shape(["n", 3, k])
    x = ir.val("x", ir.DataType.FLOAT, sizes)
    scale = ir.val("outer", const_value=ir.tensor(np.array([outer], np.float32), name="outer"))
    attributes = {"operand": str(operand), "layer": "a.layer"}
    node = ir.node("QuantizeWithin", [x, scale], attributes, domain="fpc", num_outputs=2)
    codes, blocks = node.outputs
    for value, name, shape in ((codes, "codes", sizes), (blocks, "blocks", None)):
        value.name, value.type, value.shape = name, CODES, shape
    blocks.shape = ir.Shape(["n", 3, -(-k // operand.block.block)])
    back = ir.node("Dequantize", [codes, scale, blocks], attributes, domain="fpc", num_outputs=1)
    y = back.outputs[0]
    y.name, y.shape, y.type = "y", sizes, VALUES
    nodes, opsets = [node, back], {"": 18, "fpc": 1}
    results = [y, codes, blocks]
    return finished(
        ir.Graph([x], results, nodes=nodes, initializers=[scale], opset_imports=opsets), style
    )


def finished(graph: ir.Graph, style: Style) -> ir.Model:
    """Return the model of a graph whose symbols are lowered."""
    graph.name = "test"
    model = ir.Model(graph, ir_version=8)
    lower(model, style)
    set_opset(model, needed_opset(model))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def on_onnxruntime(model: ir.Model, *inputs: Tensor) -> list[np.ndarray]:
    """Run a model on onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, _feeds(model, inputs))


def on_reference(model: ir.Model, *inputs: Tensor) -> list[np.ndarray]:
    """Run a model on onnx's own evaluator."""
    return ReferenceEvaluator(ir.to_proto(model)).run(None, _feeds(model, inputs))


def _feeds(model: ir.Model, inputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
    return {v.name: t.numpy() for v, t in zip(model.graph.inputs, inputs, strict=True)}
