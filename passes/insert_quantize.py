"""``insert-quantize``: turn each layer that the scheme names into an ``fpq.linear``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch_mlir import ir

from fpcompiler.ir.dialect import QuantizeOp
from fpcompiler.ir.linear import LinearOp
from fpcompiler.ir.locations import renamed
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.torch_ops import operator_name
from fpcompiler.ir.types import QuantizedType, tensor_type
from fpcompiler.operand import Operand
from fpcompiler.passes.base import Pass, PassContext, rewrite
from fpcompiler.passes.layers import (
    KEPT,
    KINDS,
    LAYER,
    RULE,
    is_kept,
    keep,
    layer_of,
    name_layers,
    weight_of,
)
from fpcompiler.passes.roles import ROLE, mark_roles, role_of
from fpcompiler.scheme import Match, Scheme


@dataclass(frozen=True)
class InsertQuantize(Pass):
    """Quantize the weights and activations of layers: linear, addmm, matmul and convolutions.

    Each layer gets its own ``fpq.quantize`` for its input; ``cse`` then leaves one where layers
    read the same value in the same format. A layer that is kept in high precision is marked with
    the reason, which the plan shows. Each layer is marked with its role, here and not in a pass of
    its own, so that no pipeline can leave out what a scheme's rules read.

    Attributes:
        scheme: The scheme, in any form that :meth:`fpcompiler.scheme.Scheme.parse` reads.
    """

    name: ClassVar[str] = "insert-quantize"
    requires: ClassVar[Stage] = Stage.NORMALIZED
    ensures: ClassVar[Stage] = Stage.QUANTIZED
    scheme: str = "w4a6"

    def run(self, program: Program, context: PassContext) -> None:
        """Rewrite the layers in program order."""
        name_layers(program)
        mark_roles(program)
        inserter = _Inserter(Scheme.parse(self.scheme), context)
        rewrite(program, tuple(KINDS), inserter.layer)
        for op in program.operations("torch.operator", *KEPT):
            inserter.keep_other(op)


class _Inserter:
    def __init__(self, scheme: Scheme, context: PassContext) -> None:
        self.scheme = scheme
        self.context = context

    def layer(self, op: ir.Operation) -> Sequence[ir.Value] | None:
        """Rewrite one layer, or mark it as kept."""
        name = layer_of(op)
        if name is None:
            return None
        if is_kept(op):  # by an earlier pass, which said why
            self.context.count("layers kept")
            return None
        match = self.scheme.for_layer(name, role_of(op))
        if match.weight is None:
            self._keep(op, match.rule, "the scheme keeps it in high precision")
            return None
        reason = KINDS[op.name].refuse(op)
        if reason:
            self._keep(op, match.rule, reason)
            return None
        self.context.count("layers quantized")
        return (_quantize(op, name, match, match.weight),)

    def keep_other(self, op: ir.Operation) -> None:
        """Mark an operation with a weight that no scheme can quantize."""
        name = operator_name(op)
        if name in KEPT and layer_of(op) is not None:
            self._keep(op, "", KEPT[name][1])

    def _keep(self, op: ir.Operation, rule: str, reason: str) -> None:
        keep(op, rule, reason)
        self.context.count("layers kept")


def _quantize(op: ir.Operation, name: str, match: Match, operand: Operand) -> ir.Value:
    """Create the quantized form of a layer and return its result."""
    gemm = KINDS[op.name].convert(op)
    x, activation = gemm.x, match.activation
    if activation is not None:
        x = _quantized(x, activation, renamed(op.location, f"{name}.input"))
    weight = _quantized(gemm.weight, operand, renamed(op.location, f"{name}.weight"))
    linear = LinearOp(
        x,
        weight,
        gemm.bias,
        ir.StringAttr.get(name),
        gemm.output.to_mlir(),
        loc=renamed(op.location, name),
    )
    for key, value in _description(op, match).items():
        linear.operation.attributes[key] = value
    result = gemm.restore(linear.result)
    result.owner.attributes[LAYER] = ir.StringAttr.get(name)
    return result


def _description(op: ir.Operation, match: Match) -> dict[str, ir.Attribute]:
    """Return what the plan says about a layer and its quantized form no longer shows."""
    weight = weight_of(op)
    assert weight is not None
    kind = tensor_type(weight)
    assert kind is not None
    size = prod(n or 0 for n in kind.shape) * kind.dtype.itemsize
    i64 = ir.IntegerType.get_signless(64)
    return {
        "fpq.op": ir.StringAttr.get(op.name.split(".")[2]),
        RULE: ir.StringAttr.get(match.rule),
        ROLE: op.attributes[ROLE],
        "fpq.bytes_before": ir.IntegerAttr.get(i64, size),
    }


def _quantized(value: ir.Value, operand: Operand, location: ir.Location) -> ir.Value:
    kind = tensor_type(value)
    assert kind is not None
    result = QuantizedType(kind.shape, operand).to_mlir()
    return QuantizeOp(value, result, loc=location).result
