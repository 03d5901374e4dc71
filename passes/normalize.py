"""``normalize``: remove what an exported model carries along but does not compute with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from torch_mlir import ir

from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.torch_ops import constant_value
from fpcompiler.ir.types import tensor_type
from fpcompiler.passes.base import Pass, PassContext, rewrite

_ASSERTIONS: Final = (
    "torch.aten._assert_tensor_metadata",
    "torch.aten._assert_scalar",
    "torch.bind_symbolic_shape",
)

_FACTORS: Final = ("torch.aten.mul.Scalar", "torch.aten.div.Scalar")

_NUMBERS: Final = ("torch.constant.float", "torch.constant.int")

_COPIES: Final = ("torch.aten.alias", "torch.aten.detach", "torch.aten.lift_fresh_copy")


@dataclass(frozen=True)
class Normalize(Pass):
    """Remove assertions, dropout of an evaluated model, factors of 1, and copies no one writes to.

    Sizes are checked by the runtime when the model is called, so the assertions of the exported
    graph say nothing new. What remains computes the same bits.
    """

    name: ClassVar[str] = "normalize"
    requires: ClassVar[Stage] = Stage.CAPTURED
    ensures: ClassVar[Stage] = Stage.NORMALIZED

    def run(self, program: Program, context: PassContext) -> None:
        """Erase and forward."""
        context.count("assertions removed", rewrite(program, _ASSERTIONS, lambda op: ()))
        context.count("copies removed", rewrite(program, _COPIES, _forward))
        context.count("dropouts removed", rewrite(program, ("torch.aten.dropout",), _dropout))
        context.count("factors of 1 removed", rewrite(program, _FACTORS, _factor))


def _forward(op: ir.Operation) -> Sequence[ir.Value] | None:
    """Use the input instead, if it has the very type of the result."""
    same = tensor_type(op.operands[0]) == tensor_type(op.results[0])
    return (op.operands[0],) if same else None


def _factor(op: ir.Operation) -> Sequence[ir.Value] | None:
    """Use the input of a product with 1, or of a quotient by it: models have settings like that."""
    factor = op.operands[1].owner
    constant = not isinstance(factor, ir.Block) and factor.name in _NUMBERS
    return _forward(op) if constant and constant_value(factor.operation) == 1 else None


def _dropout(op: ir.Operation) -> Sequence[ir.Value] | None:
    training = op.operands[2].owner.operation
    evaluated = training.name == "torch.constant.bool" and constant_value(training) is False
    return (op.operands[0],) if evaluated else None
