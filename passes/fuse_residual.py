"""``fuse-residual``: add residuals where layers write their results."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch_mlir import ir

from fpcompiler.ir.dialect import FLOATS
from fpcompiler.ir.linear import ScaledGemmAddOp
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.types import tensor_type
from fpcompiler.passes.base import Pass, PassContext, add_note, erase_unused, is_read_once
from fpcompiler.passes.producers import terms


@dataclass(frozen=True)
class FuseResidual(Pass):
    """Make one operation of a quantized layer and of the sum that alone reads its output.

    A kernel can then add while it has the output, and one tensor less is written and read again.
    What is added has the shape and the type of the output: nothing is broadcast. Outputs are
    rounded to their type before, so the result is the same, bit for bit (see
    :func:`fpcompiler.runtime.fused.add_residual`); a sum does not depend on the order of its two
    sides. Of a sum of two layers the later one adds the other's output.

    It runs after ``fuse-epilogue``: what is added to an activation of the output, or read by a norm
    or an activation that ``fuse-quantize`` takes, is known then.
    """

    name: ClassVar[str] = "fuse-residual"
    requires: ClassVar[Stage] = Stage.LOWERED

    def run(self, program: Program, context: PassContext) -> None:
        """Give layers their residual as an operand."""
        unused: list[ir.Value] = []
        for op in program.operations("torch.aten.add.Tensor"):
            found = list(_candidates(op))
            if not found:
                continue
            alone = [pair for pair in found if is_read_once(pair[0])]
            if not alone:
                context.count("left: the output has other uses")
                continue
            unused.append(op.operands[2])  # the factor
            _fuse(op, *functools.reduce(_later, alone))
            context.count("residuals fused")
        erase_unused(program, unused)


_Sum: TypeAlias = tuple[ir.Value, ir.Value]
"""The output of a layer, and what is added to it."""


def _candidates(op: ir.Operation) -> Iterator[_Sum]:
    """Yield outputs of layers that a sum reads, each with what is added to it."""
    kind = tensor_type(op.results[0])
    if kind is None or kind.element not in FLOATS:
        return
    for output, residual in terms(op.results[0]):
        if tensor_type(output) == kind == tensor_type(residual) and _is_layer(output):
            yield output, residual


def _is_layer(value: ir.Value) -> bool:
    """Return whether a value is what a layer gives that adds nothing yet."""
    return not isinstance(value.owner, ir.Block) and value.owner.name == "fpq.scaled_gemm"


def _later(a: _Sum, b: _Sum) -> _Sum:
    """Return the sum whose layer comes later."""
    first, second = a[0].owner.operation, b[0].owner.operation
    return b if first.is_before_in_block(second) else a


def _fuse(op: ir.Operation, output: ir.Value, residual: ir.Value) -> None:
    """Let a layer add; where the residual is computed behind it, it runs in the sum's place."""
    layer = output.owner.operation
    names = ("layer", "kernel", "reason")
    source = residual.owner
    there = isinstance(source, ir.Block) or source.operation.is_before_in_block(layer)
    with ir.InsertionPoint(layer if there else op), layer.location:
        fields = (layer.attributes[name] for name in names)
        added = ScaledGemmAddOp(*layer.operands, residual, *fields, op.results[0].type)
    for name in layer.attributes:
        added.operation.attributes[name] = layer.attributes[name]
    add_note(added.operation, "adds a residual to its output")
    op.results[0].replace_all_uses_with(added.result)
    op.erase()
    layer.erase()
