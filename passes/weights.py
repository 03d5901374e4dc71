"""The weights of layers as passes see them that round or pack: still computed, or stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_mlir import ir

from fpcompiler.calibration import Group, InputStatistics
from fpcompiler.errors import PassError, describe_layer
from fpcompiler.ir.build import global_of
from fpcompiler.ir.evaluate import ConstantEvaluator
from fpcompiler.ir.program import Program
from fpcompiler.ir.stored import given_scales, store_quantized, store_tensor
from fpcompiler.ir.torch_ops import text_of
from fpcompiler.ir.types import QuantizedType, quantized_type, tensor_type
from fpcompiler.numerics import dequantize, pack, quantize, quantize_with, unpack
from fpcompiler.numerics.folding import divide_columns
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
        return kind_of(self.op)

    @property
    def linears(self) -> set[ir.Operation]:
        """The layers that use it, folded or not."""
        return _users(self.op.results[0])

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
                value = before_fold(linear.operands[1])
                if value in seen or not self.is_open(value):
                    continue
                seen.add(value)
                layer = text_of(linear.attributes["layer"])
                self._of[group.name].append(OpenWeight(layer, value.owner.operation))

    def is_open(self, value: ir.Value) -> bool:
        """Return whether a value is a weight that is rounded, and not stored yet."""
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
        value = self._evaluator.evaluate(weight.op.operands[0])
        assert isinstance(value, Tensor)
        return value

    def own(self, group: Group) -> list[OpenWeight]:
        """Return the open weights of a group that no layer outside of it uses.

        What a group's input says about a weight holds for these only: another input that the same
        weight multiplies may say the opposite.
        """
        layers = set(group.layers)
        return [weight for weight in self.of(group) if weight.linears <= layers]

    def are_whole(self, group: Group) -> bool:
        """Return whether all weights of a group are open, not folded, and used by it alone."""
        used = {linear.operands[1] for linear in group.layers}
        folded = any(fold_of(linear) is not None for linear in group.layers)
        return not folded and len(self.own(group)) == len(used)

    def require_unsearched(self, name: str, groups: Sequence[Group]) -> None:
        """Check that a pass that changes weights or inputs comes before those that scale or round.

        Args:
            name: The pass.
            groups: The layers.

        Raises:
            PassError: If scales have been found, or all weights are stored already.
        """
        if groups and not self.every():
            raise PassError(f"{name}: all weights are rounded already; put it before that pass.")
        searched = [weight.layer for weight in self.every() if weight.op.name == "fpq.encode"]
        if searched:
            raise PassError(
                f"{describe_layer(searched[0])}: its scales were searched for the weight as it is; "
                f"put {name} before search-formats."
            )

    def replace(self, weight: OpenWeight, value: Tensor, what: str) -> None:
        """Quantize another tensor instead, stored as ``LAYER.weight.WHAT``."""
        kind = tensor_type(weight.op.operands[0])
        assert kind is not None
        with ir.InsertionPoint(weight.op), weight.op.location:
            weight.op.operands[0] = store_tensor(
                self._program, f"{weight.layer}.weight.{what}", value.to(kind.dtype).cpu(), kind
            )

    def scales(self, weight: OpenWeight) -> tuple[Tensor, ...] | None:
        """Return the scales that a weight is quantized with, if they are given."""
        return given_scales(self._program, weight.op) if weight.op.name == "fpq.encode" else None

    def opened(self, weight: OpenWeight, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return a weight before it is quantized, and its scales: given, or the operand's own."""
        value, scales = self.value(weight).to(device), self.scales(weight)
        if scales is None:
            return value, quantize(value, weight.operand, layer=weight.layer)[1]
        return value, tuple(scale.to(device) for scale in scales)

    def folded(self, group: Group) -> bool:
        """Return whether columns of the weights are divided after they are rounded."""
        return any(fold_of(linear) is not None for linear in group.layers)

    def statistics(self, group: Group, statistics: InputStatistics) -> InputStatistics:
        """Return the statistics of the input that multiplies the weights as they are rounded.

        Where columns are divided by powers of two after that, the input is divided as well.
        """
        folds = [op for op in map(fold_of, group.layers) if op is not None]
        if not folds:
            return statistics
        return statistics.divided(self._powers(folds[0]))

    def _powers(self, fold: ir.Operation) -> Tensor:
        name = global_of(fold.operands[1])
        assert name is not None
        return self._program.weights[name]

    def rounded(self, weight: OpenWeight) -> Tensor:
        """Return the values of a weight rounded to nearest, with given scales if there are any."""
        value, scales = self.value(weight), self.scales(weight)
        if scales is None:
            codes, scales = quantize(value, weight.operand, layer=weight.layer)
        else:
            codes = quantize_with(value, scales, weight.operand, layer=weight.layer)
        return dequantize(codes, scales, weight.operand)

    def store(
        self, weight: OpenWeight, packed: Tensor, scales: Sequence[Tensor], context: PassContext
    ) -> None:
        """Replace the operation by stored codes and scales, each fold of it by its own."""
        before, op = self.value(weight), weight.op
        for use in list(op.results[0].uses):
            if use.owner.name == "fpq.fold":
                folded = self._folded(weight, use.owner.operation, packed, scales)
                self._replace(weight, use.owner.operation, *folded, context)
        if next(iter(op.results[0].uses), None) is None:
            op.erase()
        else:
            self._replace(weight, op, packed, scales, context)
        context.count("weights quantized")
        context.count("values", before.numel())
        context.count("bytes before", before.numel() * before.element_size())

    def _folded(
        self, weight: OpenWeight, fold: ir.Operation, packed: Tensor, scales: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        source, target = weight.operand, kind_of(fold).operand
        codes = unpack(packed, source.format.storage_bits, weight.kind.shape[-1] or 0)
        powers = self._powers(fold).to(codes.device)
        shift = ir.IntegerAttr(fold.attributes["shift"]).value
        codes, folded = divide_columns(
            codes, tuple(scales), powers, (source, target), shift=shift, layer=weight.layer
        )
        return pack(codes, target.format.storage_bits), folded

    def _replace(
        self,
        weight: OpenWeight,
        op: ir.Operation,
        packed: Tensor,
        scales: Sequence[Tensor],
        context: PassContext,
    ) -> None:
        with ir.InsertionPoint(op), op.location:
            stored = store_quantized(
                self._program, f"{weight.layer}.weight", kind_of(op), packed, scales
            )
        op.results[0].replace_all_uses_with(stored)
        op.erase()
        context.count("bytes after", sum(t.numel() * t.element_size() for t in (packed, *scales)))


def kind_of(op: ir.Operation) -> QuantizedType:
    """Return the quantized type of the one result of an operation."""
    kind = quantized_type(op.results[0])
    assert kind is not None
    return kind


def fold_of(linear: ir.Operation) -> ir.Operation | None:
    """Return the ``fpq.fold`` that the weight of a layer goes through, if there is one."""
    owner = linear.operands[1].owner
    folds = not isinstance(owner, ir.Block) and owner.operation.name == "fpq.fold"
    return owner.operation if folds else None


def before_fold(weight: ir.Value) -> ir.Value:
    """Return a weight before the fold, or the weight itself if there is none."""
    owner = weight.owner
    folds = not isinstance(owner, ir.Block) and owner.operation.name == "fpq.fold"
    return owner.operation.operands[0] if folds else weight


def _users(value: ir.Value) -> set[ir.Operation]:
    """Return the layers that use a quantized weight, folded or not."""
    users: set[ir.Operation] = set()
    for use in value.uses:
        owner = use.owner.operation
        users |= _users(owner.results[0]) if owner.name == "fpq.fold" else {owner}
    return users
