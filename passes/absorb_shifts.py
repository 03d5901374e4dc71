"""Powers of two for each channel of a value, moved into whatever computes that value.

Norm weights, biases and the rows of weights take them for nothing: a product with a power of two is
exact, so that it may be made before or after any other product, and distributes over a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch_mlir import ir

from fpcompiler.ir import build
from fpcompiler.ir.evaluate import ConstantEvaluator
from fpcompiler.ir.program import Program
from fpcompiler.ir.stored import store_builtin, store_tensor
from fpcompiler.ir.torch_ops import constant_value, operator_name, text_of
from fpcompiler.ir.types import TensorType, tensor_type
from fpcompiler.operand import Granularity, Operand
from fpcompiler.passes.attention_heads import values_before_heads
from fpcompiler.passes.layers import LAYER
from fpcompiler.passes.weights import before_fold, kind_of

_SAME_CHANNELS: Final = frozenset(
    {
        "torch.aten.view", "torch.aten._unsafe_view", "torch.aten.reshape", "torch.aten.unsqueeze",
        "torch.aten.flatten.using_ints", "torch.aten.unflatten.int", "torch.aten.squeeze.dim",
        "torch.aten.contiguous", "torch.aten.clone", "torch.aten.relu",
    }
)  # fmt: skip
"""Operations that keep the order of values; where the last axis keeps its length, it is the same
one. A rectifier lets a positive factor through."""

_WIDE: Final = ("f64", "f32", "bf16")
"""Types between which a cast rounds in the same way at each power of two."""


@dataclass(frozen=True)
class _Edit:
    """An operand that is to be replaced by its product with the powers."""

    op: ir.Operation
    index: int
    product: Callable[[ir.Value, Tensor], ir.Value]


@dataclass(frozen=True)
class Site:
    """Where powers of two go.

    Attributes:
        place: In words.
        edits: The operands that change.
        layer: The layer whose output is multiplied, if it is one.
    """

    place: str
    edits: tuple[_Edit, ...]
    layer: ir.Operation | None = None


class Absorber:
    """Finds what can take the powers of a value, and changes it.

    Args:
        program: A program at stage ``quantized``. No operation may be erased between calls.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._evaluator = ConstantEvaluator(program)
        self._finders: dict[str, Callable[[ir.Operation], Site | None]] = {
            "torch.aten.mul.Tensor": self._product,
            "torch.aten.layer_norm": lambda op: self._norm(op, (2, 3)),
            "torch.aten.rms_norm": lambda op: self._norm(op, (2,)),
            "torch.aten.to.dtype": self._cast,
            "torch.aten.type_as": self._cast,
            "torch.aten.transpose.int": lambda op: self._other_axes(op, (1, 2)),
            "torch.aten.slice.Tensor": lambda op: self._other_axes(op, (1,)),
            "torch.aten.select.int": lambda op: self._other_axes(op, (1,)),
            "fpq.linear": self._linear,
        }

    def find(self, value: ir.Value) -> Site | None:
        """Return where the channels of a value, its last axis, can be multiplied.

        The value must have one reader: another one would see the product as well.
        """
        if isinstance(value.owner, ir.Block) or len(list(value.uses)) != 1:
            return None
        op = value.owner.operation
        name = operator_name(op)
        if name in self._finders:
            return self._finders[name](op)
        if name in _SAME_CHANNELS and _channels(op.operands[0]) == _channels(value):
            return self.find(op.operands[0])
        values = values_before_heads(op) if op.operands else None
        return None if values is None else self.find(values)

    def absorb(self, site: Site, powers: Tensor) -> None:
        """Multiply what a site names by powers of two ``[K]``."""
        if site.layer is not None and LAYER in site.layer.attributes:
            # What it computes is no longer the output of that layer, to compare with the model.
            del site.layer.attributes[LAYER]
        for edit in site.edits:
            value = edit.op.operands[edit.index]
            with ir.InsertionPoint(edit.op), edit.op.location:
                edit.op.operands[edit.index] = edit.product(value, powers)

    def _constant(self, value: ir.Value, powers: Tensor) -> ir.Value:
        """Return a new constant: the old one may be read elsewhere."""
        constant = self._evaluator.evaluate(value)
        kind = tensor_type(value)
        assert kind is not None
        name = self._evaluator.name_for(value.owner.operation)
        factor = powers.to(constant.device, constant.dtype)
        return store_tensor(self._program, f"{name}.shifted", constant * factor, kind)

    def _rows(self, value: ir.Value, powers: Tensor) -> ir.Value:
        """Return the product as an operation, which is computed when the weight is rounded."""
        kind = tensor_type(value)
        assert kind is not None
        column = powers.to(model_device(self._program), kind.dtype)[:, None]
        name = self._evaluator.name_for(value.owner.operation)
        column_kind = TensorType(tuple(column.shape), kind.element)
        factor = store_tensor(self._program, f"{name}.row_powers", column, column_kind)
        return build.aten("mul.Tensor", [value, factor], kind)

    def _row_scales(self, value: ir.Value, powers: Tensor) -> ir.Value:
        """Return given scales of rows ``[N, 1]``, multiplied, in a global as they must be."""
        name = build.global_of(value)
        assert name is not None
        scales = self._program.weights[name]
        factor = powers.to(scales.device, scales.dtype)[:, None]
        return store_builtin(self._program, f"{name}.shifted", str(value.type), scales * factor)

    def _product(self, op: ir.Operation) -> Site | None:
        channels = _channels(op.results[0])
        sides = [i for i in (1, 0) if _channels(op.operands[i]) == channels]
        for index in sides:
            if self._is_constant(op.operands[index]):
                return Site(self._name(op.operands[index]), (_Edit(op, index, self._constant),))
        found = (self.find(op.operands[index]) for index in sides)
        return next((site for site in found if site is not None), None)

    def _norm(self, op: ir.Operation, parameters: tuple[int, ...]) -> Site | None:
        """A norm over the last axis alone, with a weight for each channel, and maybe a bias."""
        channels = _channels(op.results[0])
        values = [(i, op.operands[i]) for i in parameters if tensor_type(op.operands[i])]
        shapes = [kind.shape for _, v in values if (kind := tensor_type(v)) is not None]
        if not values or values[0][0] != parameters[0]:
            return None
        fits = all(shape == (channels,) for shape in shapes)
        if not fits or not all(self._is_constant(value) for _, value in values):
            return None
        edits = tuple(_Edit(op, index, self._constant) for index, _ in values)
        return Site(" and ".join(self._name(value) for _, value in values), edits)

    def _cast(self, op: ir.Operation) -> Site | None:
        kinds = [tensor_type(value) for value in (op.operands[0], op.results[0])]
        wide = all(kind is not None and kind.element in _WIDE for kind in kinds)
        return self.find(op.operands[0]) if wide else None

    def _other_axes(self, op: ir.Operation, positions: tuple[int, ...]) -> Site | None:
        """An operation on axes that are named by some operands, if the last is not one of them."""
        kind = tensor_type(op.operands[0])
        assert kind is not None
        axes = [op.operands[i].owner for i in positions]
        known = all(not isinstance(a, ir.Block) and a.name == "torch.constant.int" for a in axes)
        last = (-1, len(kind.shape) - 1)
        if not known or any(constant_value(axis.operation) in last for axis in axes):
            return None
        return self.find(op.operands[0])

    def _linear(self, op: ir.Operation) -> Site | None:
        """The rows of a weight, if its rounding follows a factor of each row, and the bias."""
        weight, bias = before_fold(op.operands[1]), op.operands[2]
        alone = all(len(list(value.uses)) == 1 for value in {weight, op.operands[1]})
        biased = tensor_type(bias) is not None
        if not alone or (biased and not self._is_constant(bias)):
            return None
        edits = self._rows_of(weight)
        if not edits:
            return None
        if biased:
            edits.append(_Edit(op, 2, self._constant))
        return Site(f"the rows of {text_of(op.attributes['layer'])}", tuple(edits), op)

    def _rows_of(self, weight: ir.Value) -> list[_Edit]:
        """Return what multiplies the rows of an open weight; nothing if that is not possible."""
        if isinstance(weight.owner, ir.Block):
            return []
        op = weight.owner.operation
        source = op.operands[0].owner if len(op.operands) else None
        if source is None or isinstance(source, ir.Block):
            return []
        if not self._evaluator.is_constant(source.operation):
            return []
        values = _Edit(op, 0, self._rows)
        if op.name == "fpq.quantize":
            return [values] if _follows_rows(kind_of(op).operand) else []
        outer = kind_of(op).operand.outer if op.name == "fpq.encode" else None
        if outer is None or outer.granularity is not Granularity.ROW:
            return []
        return [values, _Edit(op, 1, self._row_scales)]

    def _is_constant(self, value: ir.Value) -> bool:
        known = build.global_of(value) is not None
        return known and self._evaluator.is_constant(value.owner.operation)

    def _name(self, value: ir.Value) -> str:
        return self._evaluator.name_for(value.owner.operation)


def model_device(program: Program) -> torch.device:
    """Return where the tensors of the model are: the first global is one of its own."""
    first = next(iter(program.weights.values()), None)
    return torch.device("cpu") if first is None else first.device


def _channels(value: ir.Value) -> int | None:
    kind = tensor_type(value)
    return kind.shape[-1] if kind is not None and kind.shape else None


def _follows_rows(operand: Operand) -> bool:
    """Return whether a row times a power of two has the same codes, and that power in a scale."""
    outer, block = operand.outer, operand.block
    if outer is not None:
        return outer.granularity is Granularity.ROW
    return block is not None and (block.is_real or block.format == "f8E8M0FNU")
