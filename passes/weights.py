"""The weights of layers as passes see them that round or pack: still computed, or stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch_mlir import ir

from fpcompiler.calibration import Group
from fpcompiler.ir.evaluate import ConstantEvaluator
from fpcompiler.ir.program import Program
from fpcompiler.ir.stored import given_scales, store_quantized
from fpcompiler.ir.torch_ops import text_of
from fpcompiler.ir.types import QuantizedType, quantized_type
from fpcompiler.operand import Operand
from fpcompiler.passes.base import PassContext

_COMPUTED = ("fpq.quantize", "fpq.encode")


@dataclass(frozen=True)
class OpenWeight:
    """A weight that is quantized by an operation and not stored as codes yet.

    Attributes:
        layer: The first layer that uses it.
        op: The ``fpq.quantize``, or ``fpq.encode`` with scales that are given.
    """

    layer: str
    op: ir.Operation

    @property
    def kind(self) -> QuantizedType:
        """The quantized type."""
        kind = quantized_type(self.op.results[0])
        assert kind is not None
        return kind

    @property
    def operand(self) -> Operand:
        """Format and scale levels."""
        return self.kind.operand


class OpenWeights:
    """The open weights of a program, each once, also where layers share it.

    Args:
        program: A program at stage ``quantized``.
        groups: Its layers; a weight belongs to the first group that uses it.
    """

    def __init__(self, program: Program, groups: Sequence[Group]) -> None:
        self._program = program
        self._evaluator = ConstantEvaluator(program)
        self._of: dict[str, list[OpenWeight]] = {group.name: [] for group in groups}
        seen: set[ir.Value] = set()
        for group in groups:
            for linear in group.layers:
                value = linear.operands[1]
                if value in seen or not self._is_open(value):
                    continue
                seen.add(value)
                layer = text_of(linear.attributes["layer"])
                self._of[group.name].append(OpenWeight(layer, value.owner.operation))

    def _is_open(self, value: ir.Value) -> bool:
        owner = value.owner
        if isinstance(owner, ir.Block) or owner.operation.name not in _COMPUTED:
            return False
        source = owner.operation.operands[0].owner
        return not isinstance(source, ir.Block) and self._evaluator.is_constant(source.operation)

    def of(self, group: Group) -> list[OpenWeight]:
        """Return the open weights that belong to a group."""
        return self._of[group.name]

    def every(self) -> list[OpenWeight]:
        """Return all of them, in program order."""
        return [weight for weights in self._of.values() for weight in weights]

    def value(self, weight: OpenWeight) -> Tensor:
        """Return the weight before it is quantized, ``[N, K]``."""
        value = self._evaluator.evaluate(weight.op.operands[0].owner.operation)
        assert isinstance(value, Tensor)
        return value

    def scales(self, weight: OpenWeight) -> tuple[Tensor, ...] | None:
        """Return the scales that a weight is quantized with, if they are given."""
        return given_scales(self._program, weight.op) if weight.op.name == "fpq.encode" else None

    def store(
        self, weight: OpenWeight, packed: Tensor, scales: Sequence[Tensor], context: PassContext
    ) -> None:
        """Replace the operation by stored codes and scales."""
        before, op = self.value(weight), weight.op
        with ir.InsertionPoint(op), op.location:
            stored = store_quantized(
                self._program, f"{weight.layer}.weight", weight.kind, packed, scales
            )
        op.results[0].replace_all_uses_with(stored)
        op.erase()
        context.count("weights quantized")
        context.count("values", before.numel())
        context.count("bytes before", before.numel() * before.element_size())
        context.count("bytes after", sum(t.numel() * t.element_size() for t in (packed, *scales)))
