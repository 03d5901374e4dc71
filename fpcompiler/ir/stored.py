"""Quantized values that are stored: globals for codes and scales, and the values that load them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch_mlir import ir

from fpcompiler.ir import build
from fpcompiler.ir.dialect import SCALE_SLOTS, AssembleOp, scale_slots, scale_texts
from fpcompiler.ir.program import Program
from fpcompiler.ir.types import QuantizedType, TensorType


def store_scales(
    program: Program, name: str, kind: QuantizedType, scales: Sequence[torch.Tensor]
) -> list[ir.Value]:
    """Declare and load a global for the scales of each level.

    Args:
        program: Gets the globals.
        name: What the scales belong to; the globals are ``name.outer_scale``, ``name.block_scale``.
        kind: The type of the quantized value.
        scales: In the form of :func:`fpcompiler.numerics.quantize`.

    Returns:
        A value for each of :data:`fpcompiler.ir.dialect.SCALE_SLOTS`, none where there is no level.
    """
    values: dict[str, ir.Value] = {}
    for slot, text, tensor in zip(scale_slots(kind), scale_texts(kind), scales, strict=True):
        values[slot] = store_builtin(program, f"{name}.{slot}_scale", text, tensor)
    return [values[slot] if slot in values else build.constant(None) for slot in SCALE_SLOTS]


def given_scales(program: Program, encode: ir.Operation) -> tuple[torch.Tensor, ...]:
    """Return the scales that an ``fpq.encode`` is given, which must be stored in globals."""
    names = [build.global_of(value) for value in list(encode.operands)[1:]]
    return tuple(program.weights[name] for name in names if name is not None)


def store_quantized(
    program: Program,
    name: str,
    kind: QuantizedType,
    packed: torch.Tensor,
    scales: Sequence[torch.Tensor],
) -> ir.Value:
    """Return a quantized value whose packed codes and scales are stored in globals."""
    codes = store_builtin(program, f"{name}.codes", kind.payload, packed)
    operands = (codes, *store_scales(program, name, kind, scales))
    return AssembleOp(*operands, kind.to_mlir()).result


def store_tensor(program: Program, wanted: str, tensor: torch.Tensor, kind: TensorType) -> ir.Value:
    """Declare a global for a tensor, and load it as a torch tensor of a type."""
    name = program.weights.unused_name(wanted)
    program.weights[name] = tensor
    text = build.torch_global_text(tensor)
    build.declare_global(program.module.operation, name, text)
    return build.load_global(name, text, kind.to_mlir())


def store_builtin(program: Program, wanted: str, text: str, tensor: torch.Tensor) -> ir.Value:
    """Declare a global of a builtin tensor type for a tensor, and load it as what it is."""
    name = program.weights.unused_name(wanted)
    program.weights[name] = tensor
    build.declare_global(program.module.operation, name, text)
    return build.load_builtin(name, text)
