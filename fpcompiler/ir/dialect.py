"""The ``fpq`` dialect: quantized values as types, and the operations on them.

=======================  =========================================================================
``fpq.quantize``         tensor -> quantized; computes scales and codes of the values it is given
``fpq.fused_quantize``   the same of a norm or an activation that it computes too
``fpq.encode``           tensor -> quantized; computes the codes, with scales that are given, or
                         with that of the tensor given, and those of blocks computed
``fpq.dequantize``       quantized -> tensor
``fpq.assemble``         codes and scales (stored weights, caches) -> quantized
``fpq.disassemble``      quantized -> packed codes and scales, as torch tensors
``fpq.fold``             quantized -> quantized; columns divided by powers of two, exactly
``fpq.hadamard``         tensor -> tensor; the Hadamard transform of blocks of the last axis
``fpq.linear``           ``x @ w.T + bias``; x is a tensor or quantized, w quantized
``fpq.scaled_gemm``      an ``fpq.linear`` for which a target and a kernel have been chosen, and
                         which may compute an activation of its result
``fpq.scaled_gemm_add``  the same, and a tensor is added to the result
=======================  =========================================================================

Every shape, format and scale is checked by the verifiers after each pass.
"""

# No "from __future__ import annotations": the dialect is built from the annotations as objects.
# mypy: disable-error-code="call-arg, name-defined, misc"
from typing import Any, Final

from torch_mlir import ir
from torch_mlir.dialects.ext import Dialect, Operand, Pure, Result

from fpcompiler.errors import FormatError
from fpcompiler.ir.types import (
    QuantizedType,
    Shape,
    TensorType,
    element_text,
    quantized_type,
    ranked_text,
    shape_text,
    tensor_type,
)
from fpcompiler.numerics.folding import takes_powers
from fpcompiler.numerics.given import is_nested
from fpcompiler.numerics.hadamard import HADAMARD_BLOCKS
from fpcompiler.numerics.packing import packed_bytes
from fpcompiler.numerics.shift_lowering import container_shifts
from fpcompiler.operand import Granularity


class Fpq(Dialect, name="fpq"):
    """Floating-point quantization."""


class FloatType(Fpq.Type, name="float"):
    """The element type of a format that MLIR itself does not have: ``!fpq.float<"f4E1M2FN">``."""

    spelling: ir.StringAttr


class Quantized(Fpq.Type, name="quantized"):
    """Codes with scales: ``!fpq.quantized<tensor<8x64xf4E2M1FN>, "row:f32/block32:f8E8M0FNU">``."""

    payload: ir.TypeAttr
    scales: ir.StringAttr


FLOATS: Final = ("f32", "f16", "bf16")
"""Element types of what norms and activations read."""


class VerifyError(Exception):
    """Raised inside a verifier; its message becomes the diagnostic."""


def check_operation(op: ir.OpView, check: Any) -> bool:
    """Run a check; turn its error into a diagnostic at the operation, as MLIR wants it."""
    try:
        check(op.operation)
    except (VerifyError, FormatError) as error:
        op.operation.location.emit_error(f"'{op.operation.name}' op {error}")
        return False
    return True


def need_tensor(value: ir.Value, what: str) -> TensorType:
    """Return the type of a value; anything but a ranked torch tensor is a :class:`VerifyError`."""
    found = tensor_type(value)
    if found is None:
        raise VerifyError(f"{what} must be a ranked !torch.vtensor, not {value.type}")
    return found


def need_quantized(value: ir.Value, what: str) -> QuantizedType:
    """Return the type of a value; anything but a quantized one is a :class:`VerifyError`."""
    found = quantized_type(value)
    if found is None:
        raise VerifyError(f"{what} must be !fpq.quantized, not {value.type}")
    return found


def need_same_shape(a: Shape, b: Shape, what: str) -> None:
    """Check that two shapes are equal where both are known; else it is a :class:`VerifyError`."""
    fits = len(a) == len(b) and all(x == y or None in (x, y) for x, y in zip(a, b, strict=True))
    if not fits:
        raise VerifyError(f"{what}: shape {shape_text(a)} is not {shape_text(b)}")


def scale_shapes(kind: QuantizedType) -> tuple[Shape, ...]:
    """Return the shape of the scales of each level of a quantized type.

    Raises:
        VerifyError: If the contracted axis is not known, so that blocks cannot be counted.
    """
    shapes: list[Shape] = []
    for level in kind.operand.levels:
        if level.granularity is Granularity.TENSOR:
            shapes.append((1,) * len(kind.shape))
        elif level.granularity is not Granularity.BLOCK:
            shapes.append((*kind.shape[:-1], 1))
        elif kind.shape[-1] is None:
            raise VerifyError(f"level {level} needs a last axis of known size")
        else:
            shapes.append((*kind.shape[:-1], -(-kind.shape[-1] // level.block)))
    return tuple(shapes)


SCALE_SLOTS: Final = ("outer", "block")
"""The operands of ``fpq.assemble`` that hold scales, in order."""


def scale_slots(kind: QuantizedType) -> tuple[str, ...]:
    """Return which of :data:`SCALE_SLOTS` holds the scales of each level."""
    return tuple(
        "block" if level.granularity is Granularity.BLOCK else "outer"
        for level in kind.operand.levels
    )


def scale_texts(kind: QuantizedType) -> tuple[str, ...]:
    """Return the builtin tensor type of the scales of each level, as text."""
    return tuple(
        ranked_text(shape, "f32" if level.spec is None else element_text(level.spec))
        for shape, level in zip(scale_shapes(kind), kind.operand.levels, strict=True)
    )


def check_quantize(op: ir.Operation) -> None:
    """Check that the result can hold the first operand.

    Raises:
        VerifyError: If it cannot.
    """
    source = need_tensor(op.operands[0], "input")
    result = need_quantized(op.results[0], "result")
    if not source.shape:
        raise VerifyError("input has no axis to quantize along")
    if source.element not in ("f64", "f32", "f16", "bf16"):
        raise VerifyError(f"input must hold floating-point values, not {source.element}")
    need_same_shape(result.shape, source.shape, "result")
    scale_shapes(result)


def _check_encode(op: ir.Operation) -> None:
    check_quantize(op)
    result = need_quantized(op.results[0], "result")
    expected = _slot_types(result)
    if is_nested(result.operand) and str(op.operands[2].type) == "!torch.none":
        expected = (expected[0], "!torch.none")
    _check_types(list(op.operands)[1:], expected, "scales")


def _slot_types(kind: QuantizedType) -> tuple[str, ...]:
    """Return the type of each of :data:`SCALE_SLOTS`, as text."""
    texts = dict(zip(scale_slots(kind), scale_texts(kind), strict=True))
    return tuple(texts.get(slot, "!torch.none") for slot in SCALE_SLOTS)


def part_types(kind: QuantizedType) -> tuple[TensorType | None, ...]:
    """Return the torch tensors of packed codes and of the scales in :data:`SCALE_SLOTS`.

    A level that the type does not have is None.

    Raises:
        VerifyError: If the last axis has no known size, so that codes cannot be packed.
    """
    width = kind.shape[-1]
    if width is None:
        raise VerifyError("packed codes need a last axis of known size")
    packed = packed_bytes(width, kind.operand.format.storage_bits)
    scales = {
        slot: TensorType(shape, "f32" if level.is_real else "ui8")
        for slot, shape, level in zip(
            scale_slots(kind), scale_shapes(kind), kind.operand.levels, strict=True
        )
    }
    codes = TensorType((*kind.shape[:-1], packed), "ui8")
    return codes, *(scales.get(slot) for slot in SCALE_SLOTS)


def part_texts(kind: QuantizedType) -> tuple[str, ...]:
    """Return :func:`part_types` as text, ``!torch.none`` where there is no level."""
    return tuple("!torch.none" if part is None else str(part) for part in part_types(kind))


def _check_types(values: Any, expected: tuple[str, ...], what: str) -> None:
    found = tuple(str(value.type) for value in values)
    if found != expected:
        raise VerifyError(f"{what} {', '.join(found)} are not {', '.join(expected)}")


def _check_dequantize(op: ir.Operation) -> None:
    source = need_quantized(op.operands[0], "input")
    need_same_shape(need_tensor(op.results[0], "result").shape, source.shape, "result")


def _check_assemble(op: ir.Operation) -> None:
    result = need_quantized(op.results[0], "result")
    if tensor_type(op.operands[0]) is not None:
        _check_types(op.operands, part_texts(result), "operands")
        return
    _check_types(op.operands, (result.payload, *_slot_types(result)), "operands")


def _check_disassemble(op: ir.Operation) -> None:
    _check_types(op.results, part_texts(need_quantized(op.operands[0], "input")), "results")


def _check_fold(op: ir.Operation) -> None:
    source = need_quantized(op.operands[0], "input")
    result = need_quantized(op.results[0], "result")
    need_same_shape(result.shape, source.shape, "result")
    powers = need_tensor(op.operands[1], "powers")
    need_same_shape(powers.shape, source.shape[-1:], "powers")
    before, after = source.operand, result.operand
    if before.levels != after.levels or not before.levels:
        raise VerifyError(f"the scale levels of {before} and {after} differ, or there are none")
    shift = ir.IntegerAttr(op.attributes["shift"]).value
    if before.format is after.format:
        if shift or not takes_powers(before):
            raise VerifyError(f"the scales of {before} cannot take powers of two")
    elif shift not in container_shifts(before.format, after.format):
        raise VerifyError(f"{after.format} does not hold {before.format} times 2**{shift}")


def _check_hadamard(op: ir.Operation) -> None:
    source, result = need_tensor(op.operands[0], "input"), need_tensor(op.results[0], "result")
    need_same_shape(result.shape, source.shape, "result")
    block = ir.IntegerAttr(op.attributes["block"]).value
    if block not in HADAMARD_BLOCKS or not source.shape or (source.shape[-1] or 1) % block:
        raise VerifyError(f"blocks of {block} do not fit an input {shape_text(source.shape)}")


class QuantizeOp(Fpq.Operation, name="quantize", traits=[Pure]):
    """``fpq.quantize``: compute the scales and codes of a tensor."""

    input: Operand[Any]
    result: Result[Quantized]

    @staticmethod
    def verify_invariants(op: ir.OpView) -> bool:
        """Check shapes, formats and scale levels."""
        return check_operation(op, check_quantize)


class EncodeOp(Fpq.Operation, name="encode", traits=[Pure]):
    """``fpq.encode``: the codes of a tensor for scales that a search or calibration has found.

    A level that the type does not have is ``torch.constant.none``, as in ``fpq.assemble``. So is
    the level of blocks where only the scale of the tensor is given: then it is computed within it.
    """

    input: Operand[Any]
    outer_scale: Operand[Any]
    block_scale: Operand[Any]
    result: Result[Quantized]

    @staticmethod
    def verify_invariants(op: ir.OpView) -> bool:
        """Check shapes, formats and scales."""
        return check_operation(op, _check_encode)


class DequantizeOp(Fpq.Operation, name="dequantize", traits=[Pure]):
    """``fpq.dequantize``: the values that codes and scales stand for."""

    input: Operand[Quantized]
    result: Result[Any]

    @staticmethod
    def verify_invariants(op: ir.OpView) -> bool:
        """Check that the shapes are equal."""
        return check_operation(op, _check_dequantize)


class AssembleOp(Fpq.Operation, name="assemble", traits=[Pure]):
    """``fpq.assemble``: a quantized value from stored codes and the scales of each level.

    The operands are what globals hold, or torch tensors as ``fpq.disassemble`` gives them. A level
    that the type does not have is ``torch.constant.none``: the dialect's variadic operands would
    all have to be of one type.
    """

    codes: Operand[Any]
    outer_scale: Operand[Any]
    block_scale: Operand[Any]
    result: Result[Quantized]

    @staticmethod
    def verify_invariants(op: ir.OpView) -> bool:
        """Check that codes and scales have the types that the result needs."""
        return check_operation(op, _check_assemble)


class DisassembleOp(Fpq.Operation, name="disassemble", traits=[Pure]):
    """``fpq.disassemble``: the packed codes and the scales of a quantized value.

    Torch tensors, so that a cache can be written with torch's own operations, row by row. A level
    that the type does not have is ``!torch.none``.
    """

    input: Operand[Quantized]
    codes: Result[Any]
    outer_scale: Result[Any]
    block_scale: Result[Any]

    @staticmethod
    def verify_invariants(op: ir.OpView) -> bool:
        """Check the types of the parts."""
        return check_operation(op, _check_disassemble)


class FoldOp(Fpq.Operation, name="fold", traits=[Pure]):
    """``fpq.fold``: a weight with each column divided by a power of two, in codes or block scales.

    With a wider format, codes are held as ``2**shift`` times their size, and the scales make up for
    that. A pass that stores the weight computes it.
    """

    input: Operand[Quantized]
    powers: Operand[Any]
    shift: ir.IntegerAttr
    result: Result[Quantized]

    @staticmethod
    def verify_invariants(op: ir.OpView) -> bool:
        """Check that the result has room for the powers."""
        return check_operation(op, _check_fold)


class HadamardOp(Fpq.Operation, name="hadamard", traits=[Pure]):
    """``fpq.hadamard``: the orthonormal Hadamard transform of each block of the last axis."""

    input: Operand[Any]
    block: ir.IntegerAttr
    result: Result[Any]

    @staticmethod
    def verify_invariants(op: ir.OpView) -> bool:
        """Check that blocks fit the last axis."""
        return check_operation(op, _check_hadamard)
