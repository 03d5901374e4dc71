"""The rows of the plan table: what became of each layer, and why."""

from __future__ import annotations

import math

from torch_mlir import ir

from fpcompiler.ir.build import global_of
from fpcompiler.ir.linear import GEMMS
from fpcompiler.ir.program import Program
from fpcompiler.ir.torch_ops import operator_name, text_of
from fpcompiler.ir.types import (
    QuantizedType,
    TensorType,
    parse_quantized,
    quantized_type,
    tensor_type,
)
from fpcompiler.passes.layers import weights_of
from fpcompiler.passes.quantize_cache import AFTER, BEFORE, KEPT, STORED
from fpcompiler.passes.roles import role_of
from fpcompiler.plan import LayerRow
from fpcompiler.runtime.tables import CACHE


def layer_rows(program: Program) -> tuple[LayerRow, ...]:
    """Return one row for each layer of a program at stage ``lowered``, in program order.

    A layer that runs several times has one row. After the layers stand the caches of keys and
    values that a pass has looked at.
    """
    rows: dict[str, LayerRow] = {}
    owners: dict[str, str] = {}
    with program.context():
        for op in program.operations():
            if op.name in GEMMS:
                row = _quantized_row(op, program)
            elif "fpq.kept" in op.attributes:
                row = _kept_row(op, owners)
            else:
                continue
            rows.setdefault(row.name, row)
        caches = _cache_rows(program)
    return *rows.values(), *caches


def _cache_rows(program: Program) -> list[LayerRow]:
    declared = (op.operation for op in program.module.body.operations)
    caches = (op for op in declared if op.name == "ml_program.global")
    return [row for row in (_cache_row(op, program) for op in caches) if row]


def _cache_row(op: ir.Operation, program: Program) -> LayerRow | None:
    """Return the row of a buffer that holds a cache, or of one that was not understood."""
    name = text_of(op.attributes["sym_name"])
    if STORED in op.attributes:
        kind = parse_quantized(str(ir.TypeAttr(op.attributes[STORED]).value))
        assert kind is not None
        sizes = [ir.IntegerAttr(op.attributes[key]).value for key in (BEFORE, AFTER)]
        shape, held, reason = _sizes(kind), str(kind.operand), "quantized where it is written"
        name = name.removesuffix(".codes")
    elif KEPT in op.attributes:
        tensor = program.weights[name]
        sizes, shape = [tensor.nbytes, tensor.nbytes], tuple(tensor.shape)
        held, reason = str(tensor.dtype).removeprefix("torch."), text_of(op.attributes[KEPT])
    else:
        return None
    return LayerRow(
        name=name,
        op=CACHE,
        shape=shape,
        weight=held,
        activation="",
        kernel="torch",
        reason=reason,
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        quantized=STORED in op.attributes,
    )


def _quantized_row(op: ir.Operation, program: Program) -> LayerRow:
    weight = quantized_type(op.operands[1])
    assert weight is not None
    return LayerRow(
        name=text_of(op.attributes["layer"]),
        op=text_of(op.attributes["fpq.op"]),
        shape=_sizes(weight),
        weight=str(weight.operand),
        activation=_activation_text(op.operands[0]),
        kernel=text_of(op.attributes["kernel"]),
        reason=_reason(op),
        bytes_before=ir.IntegerAttr(op.attributes["fpq.bytes_before"]).value,
        bytes_after=_stored_bytes(op.operands[1], program),
        quantized=True,
        rule=text_of(op.attributes["fpq.rule"]),
        role=role_of(op),
    )


def _reason(op: ir.Operation) -> str:
    """Return why this kernel, and what passes have noted."""
    names = [name for name in ("reason", "fpq.note") if name in op.attributes]
    return "; ".join(text_of(op.attributes[name]) for name in names)


def _stored_bytes(weight: ir.Value, program: Program) -> int:
    names = [global_of(value) for value in weight.owner.operands]
    return sum(program.weights[name].nbytes for name in names if name)


def _activation_text(x: ir.Value) -> str:
    quantized, plain = quantized_type(x), tensor_type(x)
    if quantized is not None:
        return str(quantized.operand)
    assert plain is not None
    return plain.element


def _kept_row(op: ir.Operation, owners: dict[str, str]) -> LayerRow:
    """Return the row of a layer in high precision; a weight that layers share counts once.

    Args:
        op: The layer.
        owners: The layer that each global was counted for, which this adds to.
    """
    name = text_of(op.attributes["fpq.layer"])
    weights = [kind for kind in map(tensor_type, weights_of(op)) if kind is not None]
    weight = weights[0]
    size = sum(math.prod(_sizes(kind)) * kind.dtype.itemsize for kind in weights)
    reason = text_of(op.attributes["fpq.kept"])
    source = global_of(weights_of(op)[0])
    owner = owners.setdefault(source, name) if source else name
    if owner != name:
        size, reason = 0, f"{reason}; its weight is that of {owner!r}"
    return LayerRow(
        name=name,
        op=operator_name(op).split(".")[2],
        shape=_sizes(weight),
        weight=weight.element,
        activation=weight.element,
        kernel="torch",
        reason=reason,
        bytes_before=size,
        bytes_after=size,
        quantized=False,
        rule=text_of(op.attributes["fpq.rule"]),
        role=role_of(op),
    )


def _sizes(kind: QuantizedType | TensorType) -> tuple[int, ...]:
    return tuple(size or 0 for size in kind.shape)
