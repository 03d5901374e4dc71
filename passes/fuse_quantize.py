"""``fuse-quantize``: compute norms and activations where their results are quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from fpcompiler.ir.build import constant
from fpcompiler.ir.fused_quantize import FusedQuantizeOp
from fpcompiler.ir.linear import GEMMS
from fpcompiler.ir.program import Program, Stage
from fpcompiler.passes.base import Pass, PassContext, erase_unused, is_read_once, rewrite
from fpcompiler.passes.producers import Found, find_producer


@dataclass(frozen=True)
class FuseQuantize(Pass):
    """Make one operation of a norm or an activation and of the quantize of its result.

    A kernel then need not write the values between to memory. The result is the same, bit for bit
    (see :mod:`fpcompiler.runtime.fused` for what is fused, and with which roundings). A value that
    something else reads as well (a residual sum, a layer in high precision, a quantize to another
    format) must be there in floating point anyway: it is computed once, and its quantize stays as
    it is. So does one whose scales are given (``fpq.encode``), and one that feeds attention or a
    cache and no layer.

    It runs when kernels are chosen, because methods calibrate on the single operations, and after
    ``canonicalize``, which removes casts that change nothing.
    """

    name: ClassVar[str] = "fuse-quantize"
    requires: ClassVar[Stage] = Stage.LOWERED

    def run(self, program: Program, context: PassContext) -> None:
        """Rewrite each quantize whose result only layers read."""
        fuser = _Fuser(program, context)
        rewrite(program, ("fpq.quantize",), fuser.quantize)
        erase_unused(program, fuser.replaced)


class _Fuser:
    def __init__(self, program: Program, context: PassContext) -> None:
        self.context = context
        self.none = _none(program)
        self.replaced = [self.none]  # in case that nothing reads it

    def quantize(self, op: ir.Operation) -> Sequence[ir.Value] | None:
        """Rewrite one quantize, or count why not."""
        if not _feeds_layers(op):
            return None
        found = find_producer(op.operands[0])
        if found is None:
            self.context.count("left: neither a norm nor an activation")
            return None
        if not all(map(is_read_once, (*found.inner, op.operands[0]))):
            self.context.count("left: the value has other uses")
            return None
        self.context.count(f"{found.producer.name} fused")
        self.replaced.append(op.operands[0])
        return (self._fused(op, found),)

    def _fused(self, op: ir.Operation, found: Found) -> ir.Value:
        slots = (self.none if value is None else value for value in found.slots)
        producer, eps = ir.StringAttr.get(found.producer.name), ir.FloatAttr.get_f64(found.eps)
        return FusedQuantizeOp(found.input, *slots, producer, eps, op.results[0].type).result


def _none(program: Program) -> ir.Value:
    """Return a constant that stands before every quantize."""
    first = next(iter(program.operations("torch.constant.none", "fpq.quantize")), None)
    if first is not None and first.name == "torch.constant.none":
        return first.results[0]
    with ir.InsertionPoint.at_block_begin(program.body):
        return constant(None)


def _feeds_layers(op: ir.Operation) -> bool:
    """Whether a quantized value is the input of layers, and nothing else."""
    uses = [(use.owner.name, use.operand_number) for use in op.results[0].uses]
    return bool(uses) and set(uses) <= {(name, 0) for name in GEMMS}
