"""What counts as a layer: the operations with a constant weight that can become a GEMM.

Each kind of layer is one function that turns its operation into ``y = x @ w.T + bias`` with ``w``
as [N, K], and says how ``y`` becomes the result. The conversion happens only when the layer is
quantized: one that is kept stays the operation it was, and computes the same bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch_mlir import ir

from fpcompiler.ir import build
from fpcompiler.ir.evaluate import ConstantEvaluator
from fpcompiler.ir.locations import place_of
from fpcompiler.ir.program import Program
from fpcompiler.ir.torch_ops import constant_value, operator_name, text_of
from fpcompiler.ir.types import TensorType, tensor_type

FLOATS: Final = ("f64", "f32", "f16", "bf16")

LAYER: Final = "fpq.layer"
"""Attribute of the operation whose result is the output of a layer: the layer's name."""


REASON: Final = "fpq.kept"
"""Attribute of a layer that stays in high precision: why."""

RULE: Final = "fpq.rule"
"""Attribute of a layer: the rule of the scheme that decided."""


@dataclass(frozen=True)
class Gemm:
    """A layer as a matrix product.

    Attributes:
        x: Activations [..., K].
        weight: Weights [N, K], computed from globals only.
        bias: [N], or None as a torch constant.
        output: Type of ``x @ w.T + bias``.
        restore: Turns that product into the value of the original operation.
    """

    x: ir.Value
    weight: ir.Value
    bias: ir.Value
    output: TensorType
    restore: Callable[[ir.Value], ir.Value]


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer.

    Attributes:
        weight: Position of the weight among the operands.
        refuse: Why an operation of this kind cannot become a GEMM, or an empty text.
        convert: Creates the operations before the GEMM, at the current insertion point.
    """

    weight: int
    refuse: Callable[[ir.Operation], str]
    convert: Callable[[ir.Operation], Gemm]


def _type(value: ir.Value) -> TensorType:
    kind = tensor_type(value)
    assert kind is not None
    return kind


def _same(value: ir.Value) -> ir.Value:
    return value


def _transposed(weight: ir.Value) -> ir.Value:
    kind = _type(weight)
    result = TensorType((kind.shape[1], kind.shape[0]), kind.element)
    return build.aten("transpose.int", [weight, build.constant(0), build.constant(1)], result)


def _refuse_bias(bias: ir.Value, outputs: int | None) -> str:
    kind = tensor_type(bias)
    fits = kind is None or kind.shape == (outputs,)
    return "" if fits else "what is added is not a bias with one number for each output"


def _refuse_input(x: ir.Value) -> str:
    if _type(x).shape[-1] is None:
        return "torch.export does not know the length of its input's last axis; try dynamic=None"
    return ""


def _linear(op: ir.Operation) -> Gemm:
    return Gemm(op.operands[0], op.operands[1], op.operands[2], _type(op.results[0]), _same)


def _refuse_linear(op: ir.Operation) -> str:
    shape = _type(op.operands[1]).shape
    if len(shape) != 2:
        return "the weight is not a matrix"
    return _refuse_input(op.operands[0]) or _refuse_bias(op.operands[2], shape[0])


def _matmul(op: ir.Operation) -> Gemm:
    weight = _transposed(op.operands[1])
    return Gemm(op.operands[0], weight, build.constant(None), _type(op.results[0]), _same)


def _refuse_matmul(op: ir.Operation) -> str:
    rank = len(_type(op.operands[1]).shape)
    if rank != 2:
        return f"the weight has {rank} axes; only a matrix can become a GEMM"
    return _refuse_input(op.operands[0]) if _type(op.operands[0]).shape else "the input is a scalar"


def _addmm(op: ir.Operation) -> Gemm:
    weight = _transposed(op.operands[2])
    return Gemm(op.operands[1], weight, op.operands[0], _type(op.results[0]), _same)


def _refuse_addmm(op: ir.Operation) -> str:
    factors = [constant_value(op.operands[i].owner.operation) for i in (3, 4)]
    if factors != [1, 1]:
        return f"beta and alpha are {factors[0]} and {factors[1]}, not 1"
    bias = _refuse_bias(op.operands[0], _type(op.operands[2]).shape[1])
    return _refuse_input(op.operands[1]) or bias


def _numbers(value: ir.Value) -> list[int]:
    return [constant_value(item.owner.operation) for item in value.owner.operands]


def _is_constant_list(value: ir.Value) -> bool:
    owner = value.owner
    return owner.name == "torch.prim.ListConstruct" and all(
        not isinstance(item.owner, ir.Block) and item.owner.name == "torch.constant.int"
        for item in owner.operands
    )


def _refuse_convolution(op: ir.Operation) -> str:
    if not all(_is_constant_list(op.operands[i]) for i in (3, 4, 5)):
        return "stride, padding or dilation is not a list of numbers"
    if constant_value(op.operands[6].owner.operation) != 1:
        return "it is a grouped convolution"
    x, weight = _type(op.operands[0]), _type(op.operands[1])
    return "" if len(x.shape) == len(weight.shape) else "the input has no batch axis"


def _convolution(op: ir.Operation) -> Gemm:
    """A convolution as a GEMM over its windows: ``aten.im2col``, GEMM, reshape.

    A one-dimensional one gets a second spatial axis of size 1.
    """
    x, weight = op.operands[0], op.operands[1]
    result, w = _type(op.results[0]), _type(weight)
    flat = len(w.shape) == 3
    kernel = [1 if size is None else size for size in w.shape[2:]]
    stride, padding, dilation = (_numbers(op.operands[i]) for i in (3, 4, 5))
    if flat:
        x = _unsqueezed(x)
        kernel, stride, padding, dilation = (
            [1, *kernel],
            [1, *stride],
            [0, *padding],
            [1, *dilation],
        )
    k = math.prod(size or 0 for size in w.shape[1:])
    rows = build.aten(
        "reshape",
        [weight, build.int_list([w.shape[0] or 0, k])],
        TensorType((w.shape[0], k), w.element),
    )
    columns = TensorType((result.shape[0], k, None), result.element)
    windows = [build.int_list(v) for v in (kernel, dilation, padding, stride)]
    x = build.aten("im2col", [x, *windows], columns)
    x = _swap(x, columns)
    output = TensorType((result.shape[0], None, w.shape[0]), result.element)
    return Gemm(x, rows, op.operands[2], output, lambda y: _image(y, output, result, op))


def _unsqueezed(x: ir.Value) -> ir.Value:
    kind = _type(x)
    wide = TensorType((*kind.shape[:2], 1, *kind.shape[2:]), kind.element)
    return build.aten("unsqueeze", [x, build.constant(2)], wide)


def _swap(x: ir.Value, kind: TensorType) -> ir.Value:
    swapped = TensorType((kind.shape[0], kind.shape[2], kind.shape[1]), kind.element)
    return build.aten("transpose.int", [x, build.constant(1), build.constant(2)], swapped)


def _image(y: ir.Value, kind: TensorType, result: TensorType, op: ir.Operation) -> ir.Value:
    """[batch, positions, channels] back to [batch, channels, *spatial]."""
    y = _swap(y, kind)
    sizes = [_output_size(op, axis) for axis in range(len(result.shape))]
    return build.aten("reshape", [y, build.int_list(sizes)], result)


def _output_size(op: ir.Operation, axis: int) -> int | ir.Value:
    """Size of an axis of a convolution's result, computed where it is not known."""
    known = _type(op.results[0]).shape[axis]
    if known is not None:
        return known
    size = build.size_of(op.operands[0], axis)
    if axis < 2:
        return size
    kernel = _type(op.operands[1]).shape[axis] or 1
    stride, padding, dilation = (_numbers(op.operands[i])[axis - 2] for i in (3, 4, 5))
    offset = 2 * padding - dilation * (kernel - 1) - 1
    windows = build.scalar_op("add.int", size, build.constant(offset))
    steps = build.scalar_op("floordiv.int", windows, build.constant(stride))
    return build.scalar_op("add.int", steps, build.constant(1))


KINDS: Final = {
    "torch.aten.linear": LayerKind(1, _refuse_linear, _linear),
    "torch.aten.mm": LayerKind(1, _refuse_matmul, _matmul),
    "torch.aten.matmul": LayerKind(1, _refuse_matmul, _matmul),
    "torch.aten.addmm": LayerKind(2, _refuse_addmm, _addmm),
    "torch.aten.conv1d": LayerKind(1, _refuse_convolution, _convolution),
    "torch.aten.conv2d": LayerKind(1, _refuse_convolution, _convolution),
}
"""Every kind of layer by the name of its operation."""

_PADDING: Final = "padding given as a text has no GEMM form yet; give it as numbers"

_NO_CONV: Final = "there is no GEMM form of this convolution yet"
_TRANSPOSED: Final = "a transposed convolution has no GEMM form yet"
_BATCHED: Final = "a GEMM with a weight for each batch is not supported yet"
_RECURRENT: Final = "recurrent layers are not quantized yet"

KEPT: Final = {
    "torch.aten.embedding": ((0,), "an embedding is a table, not a GEMM"),
    "torch.aten.embedding_bag.padding_idx": ((0,), "an embedding is a table, not a GEMM"),
    "torch.aten.conv1d.padding": ((1,), _PADDING),
    "torch.aten.conv2d.padding": ((1,), _PADDING),
    "torch.aten.conv3d": ((1,), _NO_CONV),
    "torch.aten.conv3d.padding": ((1,), _NO_CONV),
    "torch.aten.conv_transpose1d": ((1,), _TRANSPOSED),
    "torch.aten.conv_transpose2d.input": ((1,), _TRANSPOSED),
    "torch.aten.conv_transpose3d.input": ((1,), _TRANSPOSED),
    "torch.aten.convolution": ((1,), _NO_CONV),
    "torch.aten.bmm": ((1,), _BATCHED),
    "torch.aten.baddbmm": ((2,), _BATCHED),
    "torch.aten._grouped_mm": ((1,), "a grouped GEMM of experts is not supported yet"),
    "torch.aten.einsum": ((1,), "an einsum has no GEMM form yet; write it as a matmul"),
    "torch.aten.mv": ((0,), "a product with one vector is not quantized"),
    "torch.aten.bilinear": ((2,), "a bilinear layer is not one GEMM"),
    "torch.aten.lstm.input": ((2,), _RECURRENT),
    "torch.aten.gru.input": ((2,), _RECURRENT),
    "torch.aten.rnn_tanh.input": ((2,), _RECURRENT),
    "torch.aten.rnn_relu.input": ((2,), _RECURRENT),
    "torch.aten.lstm_cell": ((2, 3), _RECURRENT),
    "torch.aten.gru_cell": ((2, 3), _RECURRENT),
    "torch.aten.rnn_tanh_cell": ((2, 3), _RECURRENT),
    "torch.aten.rnn_relu_cell": ((2, 3), _RECURRENT),
}
"""Operators with weights that are never quantized: positions of the weights, and why.

An operand may also be a list; the weights are then the matrices in it that are globals.
"""


def weights_of(op: ir.Operation) -> list[ir.Value]:
    """Return the weights of an operation that is a layer of any kind; none for another one."""
    name = operator_name(op)
    if name in KINDS:
        return [op.operands[KINDS[name].weight]]
    positions = KEPT[name][0] if name in KEPT else ()
    return [weight for i in positions for weight in _matrices(op.operands[i])]


def _matrices(value: ir.Value) -> list[ir.Value]:
    if isinstance(value.owner, ir.Block) or value.owner.name != "torch.prim.ListConstruct":
        return [value]
    known = [item for item in value.owner.operands if build.global_of(item) is not None]
    return [item for item in known if len(_type(item).shape) > 1]


def weight_of(op: ir.Operation) -> ir.Value | None:
    """Return the first weight of an operation that is a layer of any kind, or None."""
    return next(iter(weights_of(op)), None)


def name_layers(program: Program) -> None:
    """Give every operation with a constant weight the name of its layer, as an attribute.

    That is the path of the module that ran it. Where a module runs several layers with different
    weights, each is named after its weight; a module that runs twice is one layer. Operations that
    have a name keep it.
    """
    evaluator = ConstantEvaluator(program)
    found: dict[ir.Operation, tuple[str, str]] = {}
    for op in program.operations():
        weight = weight_of(op)
        if weight is not None and LAYER not in op.attributes and _is_parameter(weight, evaluator):
            found[op] = (place_of(op).layer, _source(weight, evaluator))
    weights_of = Counter(path for path, _ in set(found.values()))
    with program.context():
        for op, (path, source) in found.items():
            name = path if path and weights_of[path] == 1 else source.removesuffix(".weight")
            op.attributes[LAYER] = ir.StringAttr.get(name)


def _source(weight: ir.Value, evaluator: ConstantEvaluator) -> str:
    """Return a name for a weight; parts of one tensor are numbered."""
    producer = weight.owner.operation
    name = evaluator.name_for(producer)
    return name if len(producer.results) == 1 else f"{name}.{ir.OpResult(weight).result_number}"


def layer_of(op: ir.Operation) -> str | None:
    """Return the name of the layer whose output an operation computes, or None."""
    return text_of(op.attributes[LAYER]) if LAYER in op.attributes else None


def keep(op: ir.Operation, rule: str, reason: str) -> None:
    """Mark a layer as kept in high precision.

    Args:
        op: The layer.
        rule: The rule of the scheme that speaks of it.
        reason: Why, for the plan.
    """
    op.attributes[REASON] = ir.StringAttr.get(reason)
    op.attributes[RULE] = ir.StringAttr.get(rule)


def is_kept(op: ir.Operation) -> bool:
    """Return whether a layer was marked by :func:`keep`."""
    return REASON in op.attributes


def _is_parameter(value: ir.Value, evaluator: ConstantEvaluator) -> bool:
    kind = tensor_type(value)
    if kind is None or kind.element not in FLOATS or isinstance(value.owner, ir.Block):
        return False
    return evaluator.is_constant(value.owner.operation)
