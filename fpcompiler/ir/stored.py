"""Quantized values that are stored: globals for codes and scales, and the values that load them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch_mlir import ir

from fpcompiler.ir import build
from fpcompiler.ir.dialect import (
    SCALE_SLOTS,
    AssembleOp,
    part_types,
    scale_slots,
    scale_texts,
)
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


Parts = tuple[ir.Value | None, ...]
"""Packed codes, then the scales in SCALE_SLOTS, as torch tensors; None where there is no level."""


@dataclass(frozen=True)
class QuantizedState:
    """A quantized value that lives from call to call: mutable globals for codes and scales.

    Attributes:
        program: The program that has the globals.
        kind: The type of the value.
        names: The globals, in the order of :data:`Parts`.
    """

    program: Program
    kind: QuantizedType
    names: tuple[str | None, ...]

    @classmethod
    def declare(
        cls,
        program: Program,
        name: str,
        kind: QuantizedType,
        packed: torch.Tensor,
        scales: Sequence[torch.Tensor],
    ) -> QuantizedState:
        """Declare the globals ``name.codes``, ``name.outer_scale``, ``name.block_scale``.

        Args:
            program: Gets the globals.
            name: What the state is.
            kind: Its type.
            packed: Its codes at first, packed.
            scales: Its scales at first, in the form of :func:`fpcompiler.numerics.quantize`.
        """
        levels = dict(zip(scale_slots(kind), scales, strict=True))
        slots = {f"{slot}_scale": levels.get(slot) for slot in SCALE_SLOTS}
        parts = {"codes": packed, **slots}
        names = tuple(
            None if tensor is None else _declare_mutable(program, f"{name}.{part}", tensor)
            for part, tensor in parts.items()
        )
        return cls(program, kind, names)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(self.program.weights[name].nbytes for name in self.names if name)

    def load(self) -> Parts:
        """Load the parts, at the insertion point."""
        return tuple(
            None if not name or not kind else build.load_global(name, text, kind.to_mlir())
            for name, text, kind in zip(
                self.names, self._texts(), part_types(self.kind), strict=True
            )
        )

    def store(self, parts: Parts) -> None:
        """Store the parts, at the insertion point."""
        for name, text, value in zip(self.names, self._texts(), parts, strict=True):
            if name and value is not None:
                build.store_global(name, value, text)

    def _texts(self) -> list[str]:
        weights = self.program.weights
        return [build.torch_global_text(weights[name]) if name else "" for name in self.names]


def assemble(parts: Parts, kind: QuantizedType) -> ir.Value:
    """Return the quantized value that parts stand for, at the insertion point."""
    operands = [build.constant(None) if part is None else part for part in parts]
    return AssembleOp(*operands, kind.to_mlir()).result


def _declare_mutable(program: Program, wanted: str, tensor: torch.Tensor) -> str:
    name = program.weights.unused_name(wanted)
    program.weights[name] = tensor
    text = build.torch_global_text(tensor)
    build.declare_global(program.module.operation, name, text, mutable=True)
    return name
