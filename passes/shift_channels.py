"""The rewriting of ``preshift``: the input of layers times powers of two, their weights divided."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor
from torch_mlir import ir

from fpcompiler.calibration import Group
from fpcompiler.errors import NumericsError, PassError, describe_layer
from fpcompiler.formats import FloatSpec, parse_format
from fpcompiler.ir import build
from fpcompiler.ir.dialect import EncodeOp, FoldOp, QuantizeOp
from fpcompiler.ir.program import Program
from fpcompiler.ir.stored import store_scales, store_tensor
from fpcompiler.ir.types import QuantizedType, TensorType, quantized_type, tensor_type
from fpcompiler.numerics.folding import takes_powers
from fpcompiler.numerics.powers import exact_power
from fpcompiler.numerics.shift_lowering import Buckets, container, container_limit
from fpcompiler.operand import Operand
from fpcompiler.passes.absorb_shifts import Absorber, model_device
from fpcompiler.passes.weights import before_fold, fold_of, kind_of

CONTAINERS: Final = ("f6E3M2FN", "f8E4M3FN", "f8E5M2")
"""Formats that may hold folded codes, the best first."""


@dataclass(frozen=True, eq=False)
class Shift:
    """What is to be done with the input of a group of layers.

    Attributes:
        group: The layers.
        exponents: ``k_j``, int32 ``[K]``, some of them above 0.
        lowering: ``permute``, ``container`` or ``smooth``.
        buckets: The order of channels for ``permute``.
        scale: The static scale of the input, fp32 of one value, if one was searched.
        format: The element format that was found with it.
    """

    group: Group
    exponents: Tensor
    lowering: str
    buckets: Buckets | None = None
    scale: Tensor | None = None
    format: FloatSpec | None = None

    @property
    def largest(self) -> int:
        """The largest ``k_j``."""
        return int(self.exponents.max())

    @property
    def quantize(self) -> ir.Operation:
        """The operation that quantizes the input."""
        assert self.group.quantize is not None
        return self.group.quantize

    def describe(self) -> str:
        """Return what becomes of the weights, in words."""
        if self.buckets is not None:
            zeros = len(self.buckets.order) - self.group.k
            return f"channels permuted into blocks of equal k, {zeros} zeros added"
        if self.lowering == "container":
            return "weights hold 2**-k in their codes"
        return "weights rounded with 2**-k"


def shift_input(program: Program, shift: Shift, absorber: Absorber | None) -> str:
    """Multiply the input by ``2**k_j``, in what computes it if that can be, and say where.

    Returns:
        Where the input is multiplied; empty if by an operation of its own.
    """
    quantize = shift.quantize
    site = None if absorber is None else absorber.find(shift.group.x)
    if site is not None and absorber is not None:
        absorber.absorb(site, exact_power(shift.exponents))
        return site.place
    kind = tensor_type(shift.group.x)
    assert kind is not None
    with ir.InsertionPoint(quantize), quantize.location:
        factor = _constant(program, shift, "input.powers", _powers(shift))
        quantize.operands[0] = build.aten("mul.Tensor", [shift.group.x, factor], kind)
    return ""


def divide_weights(program: Program, shift: Shift) -> None:
    """Divide the columns of the weights by ``2**k_j``: after they are rounded, or before.

    Raises:
        PassError: If no format holds the divided weights of a layer.
    """
    done: dict[ir.Value, ir.Value] = {}
    first = shift.group.layers[0]
    with ir.InsertionPoint(shift.quantize), first.location:
        powers = _constant(program, shift, "weight.powers", _powers(shift))
    for linear in shift.group.layers:
        weight = linear.operands[1]
        if weight not in done:
            with ir.InsertionPoint(linear), weight.owner.operation.location:
                done[weight] = _divided(weight, powers, shift)
        linear.operands[1] = done[weight]


def quantize_input(program: Program, shift: Shift) -> None:
    """Permute the channels of input and weights and set the scale of the input, where wanted."""
    quantize = shift.quantize
    if shift.buckets is None and shift.scale is None:
        return
    with ir.InsertionPoint(quantize), quantize.location:
        x, kind = quantize.operands[0], kind_of(quantize)
        scales = list(quantize.operands)[1:]
        if shift.buckets is not None:
            index = _constant(program, shift, "input.order", shift.buckets.order)
            x, kind = _permuted(x, index), _longer(quantize, index)
            _permute_weights(program, shift, index)
        if shift.format is not None:
            kind = QuantizedType(kind.shape, replace(kind.operand, format=shift.format))
        if shift.scale is not None:
            scale = shift.scale.view((1,) * len(kind.shape))
            scales = store_scales(program, f"{shift.group.name}.input", kind, (scale,))
        create = EncodeOp if scales else QuantizeOp
        value = create(x, *scales, kind.to_mlir()).result
    quantize.results[0].replace_all_uses_with(value)
    quantize.erase()


def _permute_weights(program: Program, shift: Shift, index: ir.Value) -> None:
    powers = _constant(program, shift, "permuted.powers", _of_places(shift))
    done: dict[ir.Value, ir.Value] = {}
    for linear in shift.group.layers:
        weight = linear.operands[1]
        if weight not in done:
            with ir.InsertionPoint(linear), weight.owner.operation.location:
                done[weight] = _permuted_weight(linear, index, powers)
        linear.operands[1] = done[weight]


def lowering_for(group: Group, wanted: str) -> str:
    """Return how the weights of a group are divided.

    Args:
        group: The layers.
        wanted: ``auto`` permutes where all weights have block scales, and uses a wider format
            otherwise.

    Raises:
        PassError: If the weights have no block scales to permute for.
    """
    blocks = [operand.block is not None for operand in _operands(group)]
    if wanted == "permute" and not all(blocks):
        raise PassError(
            f"{describe_layer(group.name)}: its weights have no block scales that could take powers"
            " of two. Use lowering=container, or auto, which chooses for each layer."
        )
    if wanted != "auto":
        return wanted
    return "permute" if all(blocks) else "container"


def limit_for(group: Group, lowering: str, most: int) -> int:
    """Return the largest exponent up to ``most`` that the divided weights of a group can have."""
    if lowering != "container":
        return most
    wide = _containers()
    return min(container_limit(own.format, most, wide) for own in _operands(group))


def _containers() -> list[FloatSpec]:
    return [parse_format(name) for name in CONTAINERS]


def block_of(group: Group) -> int:
    """Return the length of the longest block among the weights of a group, or 0."""
    return max(operand.block.block if operand.block else 0 for operand in _operands(group))


def _operands(group: Group) -> list[Operand]:
    kinds = [quantized_type(op.operands[1]) for op in group.layers]
    return [kind.operand for kind in kinds if kind is not None]


def _constant(program: Program, shift: Shift, what: str, value: Tensor) -> ir.Value:
    """Store a vector for a group of layers and load it."""
    kind = tensor_type(shift.group.x)
    assert kind is not None
    element = kind.element if value.is_floating_point() else "si64"
    vector = TensorType(tuple(value.shape), element)
    return store_tensor(
        program, f"{shift.group.name}.{what}", value.to(model_device(program)), vector
    )


def _powers(shift: Shift) -> Tensor:
    """Return ``2**k_j`` in the type of the input, which holds them: see ``preshift``."""
    kind = tensor_type(shift.group.x)
    assert kind is not None
    return exact_power(shift.exponents).to(kind.dtype)


def _of_places(shift: Shift) -> Tensor:
    """Return the powers in the order of the buckets; a zero has that of its bucket."""
    assert shift.buckets is not None
    powers = exact_power(shift.buckets.group_exponents).to(_powers(shift).dtype)
    return powers.repeat_interleave(shift.buckets.group)


def _divided(weight: ir.Value, powers: ir.Value, shift: Shift) -> ir.Value:
    op = weight.owner.operation
    kind = kind_of(op)
    in_scales = shift.lowering == "permute" and all(map(takes_powers, _operands(shift.group)))
    if in_scales or shift.lowering == "container":
        return _fold(weight, powers, shift, kind)
    source = op.operands[0]
    plain = tensor_type(source)
    assert plain is not None
    divided = build.aten("div.Tensor", [source, powers], plain)
    return QuantizeOp(divided, kind.to_mlir()).result


def _fold(weight: ir.Value, powers: ir.Value, shift: Shift, kind: QuantizedType) -> ir.Value:
    format, offset = kind.operand.format, 0
    if shift.lowering == "container":
        try:
            held = container(format, shift.largest, _containers())
        except NumericsError as error:
            raise PassError(f"{describe_layer(shift.group.name)}: {error}") from error
        format, offset = held.format, held.shift
    wide = QuantizedType(kind.shape, Operand(format, kind.operand.levels))
    number = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), offset)
    return FoldOp(weight, powers, number, wide.to_mlir()).result


def _permuted_weight(linear: ir.Operation, index: ir.Value, powers: ir.Value) -> ir.Value:
    """Return the weight with its columns in the order, rounded after that."""
    fold = fold_of(linear)
    weight = before_fold(linear.operands[1])
    quantize = weight.owner.operation
    longer = _longer(quantize, index)
    permuted = _permuted(quantize.operands[0], index)
    rounded = QuantizeOp(permuted, longer.to_mlir()).result
    if fold is None:
        return rounded
    return FoldOp(rounded, powers, fold.attributes["shift"], longer.to_mlir()).result


def _permuted(value: ir.Value, index: ir.Value) -> ir.Value:
    """Return ``value[..., index]``, where the index after the last means 0."""
    kind, size = tensor_type(value), tensor_type(index)
    assert kind is not None
    assert size is not None
    wider = TensorType((*kind.shape[:-1], (kind.shape[-1] or 0) + 1), kind.element)
    zero = build.constant(0)
    padded = build.aten("constant_pad_nd", [value, build.int_list([0, 1]), zero], wider)
    result = TensorType((*kind.shape[:-1], *size.shape), kind.element)
    return build.aten("index_select", [padded, build.constant(-1), index], result)


def _longer(quantize: ir.Operation, index: ir.Value) -> QuantizedType:
    """Return the quantized type with as many channels as there are places."""
    kind, size = kind_of(quantize), tensor_type(index)
    assert size is not None
    return QuantizedType((*kind.shape[:-1], *size.shape), kind.operand)
