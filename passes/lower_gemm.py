"""``lower-gemm``: choose the kernel that runs each quantized layer on a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from fpcompiler import target as targets
from fpcompiler.errors import TargetError, describe_layer
from fpcompiler.ir.linear import ScaledGemmOp
from fpcompiler.ir.locations import place_of
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.torch_ops import text_of
from fpcompiler.ir.types import quantized_type
from fpcompiler.passes.base import Pass, PassContext, rewrite


@dataclass(frozen=True)
class LowerGemm(Pass):
    """Legalize: every ``fpq.linear`` becomes an ``fpq.scaled_gemm`` that the target can run.

    A layer that the target cannot run is an error that names it; nothing falls back silently.

    Attributes:
        target: Name of the target.
    """

    name: ClassVar[str] = "lower-gemm"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    ensures: ClassVar[Stage] = Stage.LOWERED
    target: str = "reference"

    def run(self, program: Program, context: PassContext) -> None:
        """Rewrite every layer.

        Raises:
            TargetError: If the target has no kernel for a layer.
        """
        target = targets.lookup(self.target)
        count = rewrite(program, ("fpq.linear",), lambda op: _lower(op, target))
        context.count("layers lowered", count)


def _lower(op: ir.Operation, target: targets.Target) -> Sequence[ir.Value]:
    layer = text_of(op.attributes["layer"])
    x, weight = quantized_type(op.operands[0]), quantized_type(op.operands[1])
    assert weight is not None
    reason = target.supports(weight.operand, x.operand if x else None)
    if reason:
        source = place_of(op).source
        raise TargetError(
            f"{describe_layer(layer)}{f' ({source})' if source else ''} cannot run on {reason}.\n"
            f"Choose another scheme for it (the rule '{layer}: skip' keeps it in high precision) "
            "or another target (see: fpcompiler targets)."
        )
    kind = target.kind_for(weight.operand, x.operand if x else None)
    assert kind is not None
    gemm = ScaledGemmOp(
        *op.operands,
        ir.StringAttr.get(layer),
        ir.StringAttr.get(target.name),
        ir.StringAttr.get(f"{kind.name}: {kind.instruction}"),
        op.results[0].type,
    )
    for name in op.attributes:
        if name.startswith("fpq."):
            gemm.operation.attributes[name] = op.attributes[name]
    return (gemm.result,)
