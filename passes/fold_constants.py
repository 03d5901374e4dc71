"""``fold-constants``: compute at compile time what depends on weights and constants only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch_mlir import ir

from fpcompiler.ir import build
from fpcompiler.ir.evaluate import ConstantEvaluator
from fpcompiler.ir.program import Program
from fpcompiler.ir.types import tensor_type
from fpcompiler.passes.base import Pass, PassContext, has_no_uses


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace operations on globals and constants by new globals that hold their results.

    Only the last operation of such a chain is replaced, the others then have no use; where that is
    a transposed or expanded view, it stays, and what it views is replaced. A result that is larger
    than everything it was computed from stays an operation unless it is small: it would cost more
    to store than to compute.

    Attributes:
        max_growth: How many values more than its inputs a folded result may have.
    """

    name: ClassVar[str] = "fold-constants"
    max_growth: int = 65536

    def run(self, program: Program, context: PassContext) -> None:
        """Fold, in program order."""
        evaluator = ConstantEvaluator(program)
        for op in program.operations():
            if evaluator.is_constant(op) and self._is_last(op, evaluator):
                self._fold(program, op, evaluator, context)
        _erase_unused(program)

    def _is_last(self, op: ir.Operation, evaluator: ConstantEvaluator) -> bool:
        """Whether a tensor result is read by something that is not constant itself."""
        if len(op.results) != 1 or tensor_type(op.results[0]) is None or evaluator.is_leaf(op):
            return False
        return any(not evaluator.is_constant(use.owner.operation) for use in op.results[0].uses)

    def _fold(
        self,
        program: Program,
        op: ir.Operation,
        evaluator: ConstantEvaluator,
        context: PassContext,
    ) -> None:
        sources = evaluator.source_values(op)
        value = evaluator.evaluate(op.results[0])
        if not isinstance(value, torch.Tensor) or value.numel() > sources + self.max_growth:
            return
        if not value.is_contiguous():
            # A view costs nothing, and products of a copy may differ in the last bit.
            for producer in evaluator.producers(op):
                if tensor_type(producer.results[0]) and not evaluator.is_leaf(producer):
                    self._fold(program, producer, evaluator, context)
            return
        kind = tensor_type(op.results[0])
        assert kind is not None
        name = program.weights.unused_name(evaluator.name_for(op))
        # A view would keep the whole tensor it was taken from alive.
        program.weights[name] = value.detach().clone()
        text = build.torch_global_text(value)
        build.declare_global(program.module.operation, name, text)
        with ir.InsertionPoint(op):
            loaded = build.load_global(name, text, kind.to_mlir())
        op.results[0].replace_all_uses_with(loaded)
        context.count("constants folded")


def _erase_unused(program: Program) -> None:
    """Erase the operations that folding left without a use, last ones first."""
    for op in reversed(program.operations()):
        pure = op.name.startswith(("torch.aten.", "torch.prim.", "torch.constant.", "torch_c."))
        pure = pure or op.name in ("ml_program.global_load", "torch.vtensor.literal")
        if pure and op.results and has_no_uses(op):
            op.erase()
