"""An ONNX file run with its quantizations and products laid open, and each of them checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from fpcompiler.artifact import Artifact
from fpcompiler.numerics import dequantize, quantize
from fpcompiler.operand import Operand
from fpcompiler.runtime.reference import elements

Array = np.ndarray[Any, Any]


class GatherElements(OpRun):
    """The operation as ONNX defines it: onnx 1.23.2's own fails where an index is smaller."""

    def _run(self, data: Array, indices: Array, axis: int = 0) -> tuple[Array]:
        axis %= data.ndim
        places = list(np.ogrid[tuple(map(slice, indices.shape))])
        places[axis] = indices
        return (data[tuple(places)],)


def evaluate(
    file: Path, style: str, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, Array]]:
    """Run a file, on onnxruntime if it is portable and else on the evaluator of onnx.

    Returns:
        Its outputs, and by name what quantizations and products read and give.
    """
    model = ir.load(file)
    names = [value.name for value in model.graph.outputs]
    opened = _opened(model)
    for value in opened:
        if value.name not in names and value.const_value is None:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(value)
    feeds = {
        value.name: tensor.numpy() for value, tensor in zip(model.graph.inputs, inputs, strict=True)
    }
    proto = ir.to_proto(model)
    if style == "portable":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session: Any = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    else:
        session = ReferenceEvaluator(proto, new_ops=[GatherElements])
    wanted = [value.name for value in model.graph.outputs]
    found = dict(zip(wanted, session.run(wanted, feeds), strict=True))
    return [torch.from_numpy(np.asarray(found[name])) for name in names], found


def _opened(model: ir.Model) -> list[ir.Value]:
    values = [value for pair in _quantizers(model).values() for value in pair]
    for product in _products(model).values():
        values += [product.inputs[0], product.outputs[0]]  # type: ignore[list-item]
    return [*dict.fromkeys(values)]


def _quantizers(model: ir.Model) -> dict[str, tuple[ir.Value, ir.Value]]:
    """Return what each quantization reads and gives, by layer."""
    groups: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        place, _, _ = (node.name or "").rpartition("/")
        if place.endswith("/quantize"):
            groups.setdefault(place.removesuffix("/quantize"), []).append(node)
    return {layer: (nodes[0].inputs[0], nodes[-1].outputs[0]) for layer, nodes in groups.items()}  # type: ignore[misc]


def _products(model: ir.Model) -> dict[str, ir.Node]:
    """Return the product of each layer: what reads the transposed weight."""
    found = {}
    for node in model.graph:
        place, _, _ = (node.name or "").rpartition("/")
        if not place.endswith("/weight"):
            continue
        for reader, _ in node.outputs[0].uses():
            if reader.op_type == "Transpose":
                ((product, _),) = reader.outputs[0].uses()
                found[place.removesuffix("/weight")] = product
    return found


def check_steps(artifact: Artifact, file: Path, tensors: Mapping[str, Array]) -> dict[str, Any]:
    """Return how many quantizations are ours bit for bit, and how near products are to fp64."""
    model = ir.load(file)
    operands = {
        step.args[-1]: Operand.parse(step.args[-2])
        for step in artifact.plan.steps
        if step.op in ("fpc.quantize", "fpc.fused_quantize")
    }
    quantizers, equal = _quantizers(model), 0
    for layer, (x, result) in quantizers.items():
        operand = operands[layer]
        codes, scales = quantize(torch.from_numpy(tensors[x.name or ""].copy()), operand)
        inner = (scales[-1],) if operand.block else ()
        expected = dequantize(codes, inner, elements(operand)).numpy()
        equal += np.array_equal(tensors[result.name or ""], expected)
    products = _products(model)
    weights = _inner_weights(artifact)
    worst = max(_ratio(tensors, node, weights[layer]) for layer, node in products.items())
    return {
        "quantizations": len(quantizers),
        "bit_equal": equal,
        "products": len(products),
        "largest_error_to_bound": worst,
    }


def _inner_weights(artifact: Artifact) -> dict[str, Tensor]:
    from fpcompiler.numerics import dequantize_packed

    plan, found = artifact.plan, {}
    for step in plan.steps:
        if step.op == "fpc.linear":
            packed, *scales = (artifact.tensors[plan.constants[a["v"]]] for a in step.args[1])
            operand = Operand.parse(step.args[4])
            inner = (scales[-1],) if operand.block else ()
            found[step.args[7]] = dequantize_packed(packed, inner, elements(operand), step.args[5])
    return found


def _ratio(tensors: Mapping[str, Array], node: ir.Node, weight: Tensor) -> float:
    """Return the largest error of a product in units of ``K * 2**-24 * sum|ab|``."""
    names = [value.name or "" for value in (node.inputs[0], node.outputs[0]) if value is not None]
    x, y = (torch.from_numpy(tensors[name]).double() for name in names)
    wide = weight.double()
    bound = x.shape[-1] * 2.0**-24 * (x.abs() @ wide.abs().T)
    error = (x @ wide.T - y).abs()
    return float((error / bound.clamp(min=1e-300)).max())
