"""``fuse-epilogue``: compute activations where layers write their results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from fpcompiler.ir.linear import ACTIVATION, activation_of
from fpcompiler.ir.program import Program, Stage
from fpcompiler.passes.base import Pass, PassContext, add_note, erase_unused
from fpcompiler.passes.producers import find_activation


@dataclass(frozen=True)
class FuseEpilogue(Pass):
    """Make one operation of a quantized layer and of the activation that alone reads its output.

    A kernel can then compute it before the output leaves its core, and one tensor less goes through
    memory. Outputs are rounded to their type before, so the result is the same, bit for bit (see
    :func:`fpcompiler.runtime.fused.activate`). An output that something else reads as well must be
    there anyway: its activation stays an operation of its own.

    It runs after ``fuse-quantize``, which has priority: of an activation that is quantized not even
    the result need be written. What is left for this pass is read in floating point: by a product
    of two branches where inputs are not quantized, by a layer in high precision, by several.
    """

    name: ClassVar[str] = "fuse-epilogue"
    requires: ClassVar[Stage] = Stage.LOWERED

    def run(self, program: Program, context: PassContext) -> None:
        """Give each layer its activation as an attribute."""
        unused: list[ir.Value] = []
        for layer in program.operations("fpq.scaled_gemm"):
            readers = [use.owner.operation for use in layer.results[0].uses]
            names = [_activation(reader) for reader in readers]
            if activation_of(layer) or not any(names):
                continue
            if len(readers) > 1:
                context.count("left: the output has other uses")
                continue
            unused += _fuse(layer, readers[0], names[0])
            context.count(f"{names[0]} fused")
        erase_unused(program, unused)


def _activation(op: ir.Operation) -> str:
    """Return which activation an operation is; empty for none."""
    found = find_activation(op.results[0]) if len(op.results) == 1 else None
    return "" if found is None else found.producer.name


def _fuse(layer: ir.Operation, op: ir.Operation, name: str) -> Iterable[ir.Value]:
    """Let a layer compute what an operation does; return what that has read beside the output."""
    layer.attributes[ACTIVATION] = ir.StringAttr.get(name)
    add_note(layer, f"computes {name} of its output")
    op.results[0].replace_all_uses_with(layer.results[0])
    beside = list(op.operands)[1:]
    op.erase()
    return beside
