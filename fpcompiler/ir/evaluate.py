"""Evaluation of the parts of a program that depend on no input."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch_mlir import ir

from fpcompiler.ir.build import global_of, symbol_name
from fpcompiler.ir.program import Program
from fpcompiler.ir.torch_ops import constant_value, literal_value, resolve

_LEAVES: Final = (
    "ml_program.global_load",
    "torch_c.from_builtin_tensor",
    "torch.vtensor.literal",
)

# Operations that draw random numbers, or whose result is not a function of their operands.
_IMPURE: Final = ("rand", "bernoulli", "dropout", "multinomial", "normal", "uniform", "empty")


class ConstantEvaluator:
    """Tells which operations depend on globals and constants only, and computes them.

    Results are kept while the evaluator lives, so a chain is computed once.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._mutable = _mutable_globals(program)
        self._constant: dict[ir.Operation, bool] = {}
        self._values: dict[ir.Value, Any] = {}

    def is_leaf(self, op: ir.Operation) -> bool:
        """Whether an operation only brings a global or a scalar into the program."""
        return op.name in _LEAVES or op.name.startswith("torch.constant.")

    def is_constant(self, op: ir.Operation) -> bool:
        """Whether an operation depends on globals and constants only and can be computed."""
        pending = [op]
        while pending:  # not recursive: what an operation depends on can be the whole program
            known = self._constant
            missing = [other for other in self.producers(pending[-1]) if other not in known]
            if not missing:
                last = pending.pop()
                known[last] = self._decide(last)
            pending += missing
        return self._constant[op]

    def producers(self, op: ir.Operation) -> list[ir.Operation]:
        """Return the operations that an operation reads; arguments of the function have none."""
        owners = (value.owner for value in op.operands)
        return [owner.operation for owner in owners if not isinstance(owner, ir.Block)]

    def _decide(self, op: ir.Operation) -> bool:
        if op.name == "ml_program.global_load":
            return global_of(op.result) not in self._mutable
        if not op.name.startswith(("torch.", "torch_c.")) or not op.results:
            return False
        if any(word in op.name for word in _IMPURE):
            return False
        if any(isinstance(value.owner, ir.Block) for value in op.operands):
            return False
        return all(self._constant[producer] for producer in self.producers(op))

    def source_values(self, op: ir.Operation) -> int:
        """Return how many values the globals hold that a constant operation depends on."""
        names = {name for name in (global_of(value) for value in self._cone(op)) if name}
        return sum(self._program.weights[name].numel() for name in names)

    def name_for(self, op: ir.Operation) -> str:
        """Return a name for the result: after the one global it comes from, or the operation."""
        itself = global_of(op.results[0])
        if itself is not None:
            return itself
        names = sorted({name for name in (global_of(value) for value in self._cone(op)) if name})
        if op.name == "torch.prim.ListUnpack" and len(names) == 1:
            return names[0]
        step = op.name.removeprefix("torch.aten.").split(".")[0]
        return f"{names[0]}.{step}" if len(names) == 1 else f"folded.{step}"

    def _cone(self, op: ir.Operation) -> list[ir.Value]:
        """Return every value that an operation depends on."""
        seen: dict[ir.Value, None] = {}
        pending = list(op.operands)
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen[value] = None
            pending += list(value.owner.operands)
        return list(seen)

    def evaluate(self, value: ir.Value) -> Any:
        """Return a result of a constant operation.

        Raises:
            IRError: If torch has no such operator, or a tensor is not loaded.
        """
        with torch.no_grad():
            return self._value(value)

    def _value(self, value: ir.Value) -> Any:
        if value not in self._values:
            op = value.owner.operation
            args = [self._value(operand) for operand in op.operands]
            results = self._execute(op, args)
            self._values.update(zip(op.results, results, strict=True))
        return self._values[value]

    def _execute(self, op: ir.Operation, args: list[Any]) -> list[Any]:
        if op.name == "ml_program.global_load":
            return [self._program.weights[symbol_name(op)]]
        if op.name == "torch_c.from_builtin_tensor":
            return args
        if op.name == "torch.vtensor.literal":
            return [literal_value(op)]
        if op.name.startswith("torch.constant."):
            return [constant_value(op)]
        if op.name == "torch.prim.ListConstruct":
            return [args]
        if op.name == "torch.prim.ListUnpack":
            return list(args[0])
        function, positional, keywords = resolve(op, args)
        result = function(*positional, **keywords)
        return [result] if len(op.results) == 1 else list(result)


def _mutable_globals(program: Program) -> set[str]:
    declared = (op.operation for op in program.module.body.operations)
    return {
        ir.StringAttr(op.attributes["sym_name"]).value
        for op in declared
        if op.name == "ml_program.global" and "is_mutable" in op.attributes
    }
