"""The clean-up passes of MLIR itself: ``cse``, ``canonicalize``, ``symbol-dce``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.passmanager import PassManager

from fpcompiler.ir.program import Program
from fpcompiler.passes.base import Pass, PassContext


def _run_mlir(program: Program, name: str) -> None:
    PassManager.parse(f"builtin.module({name})").run(program.module.operation)


@dataclass(frozen=True)
class Cse(Pass):
    """Merge equal operations: linears that read one activation then share its quantize."""

    name: ClassVar[str] = "cse"

    def run(self, program: Program, context: PassContext) -> None:
        """Run MLIR's common subexpression elimination."""
        before = len(program.operations())
        _run_mlir(program, self.name)
        context.count("operations removed", before - len(program.operations()))


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Fold and simplify with the patterns that MLIR's own dialects bring."""

    name: ClassVar[str] = "canonicalize"

    def run(self, program: Program, context: PassContext) -> None:
        """Run MLIR's canonicalizer."""
        before = len(program.operations())
        _run_mlir(program, self.name)
        context.count("operations removed", before - len(program.operations()))


@dataclass(frozen=True)
class SymbolDce(Pass):
    """Drop the globals that nothing reads any more, and their tensors."""

    name: ClassVar[str] = "symbol-dce"

    def run(self, program: Program, context: PassContext) -> None:
        """Run MLIR's symbol elimination, then forget the tensors of what it removed."""
        before = len(program.weights)
        _run_mlir(program, self.name)
        program.weights.keep(global_names(program))
        context.count("tensors dropped", before - len(program.weights))


def global_names(program: Program) -> set[str]:
    """Return the names of the globals that the module declares."""
    declared = (op.operation for op in program.module.body.operations)
    return {
        ir.StringAttr(op.attributes["sym_name"]).value
        for op in declared
        if op.name == "ml_program.global"
    }
