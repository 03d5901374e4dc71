"""Quantizers whose results something else than a layer reads: caches of keys and values.

They give what the operator gives, bit for bit. Only codes of eight bits without scales of blocks
are made in this way: those of fewer bits are packed by the kernels, and the operator gives each a
byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.operand import Operand
from fpcompiler.plan import Step
from fpcompiler.runtime.cuda.flags import Flags
from fpcompiler.runtime.cuda.form import InputKind
from fpcompiler.runtime.cuda.quantizers import (
    NOTHING,
    Place,
    QuantizeKernels,
    quantize_rows,
    type_names,
)
from fpcompiler.runtime.operators import Function
from fpcompiler.runtime.ops import scale_shape

QUANTIZE: Final = "fpc.quantize"
"""The operator in a plan: values, operand and layer."""

_BITS: Final = 8


def kind_of(step: Step, k: int = 0) -> InputKind | None:
    """Return what kernels must make to run a step, for rows of ``k``; None if none can."""
    if step.op != QUANTIZE or step.kwargs:
        return None
    operand = Operand.parse(str(step.args[1]))
    return _kind(operand, k) if operand.format.storage_bits == _BITS and not operand.block else None


def _kind(operand: Operand, k: int) -> InputKind:
    return InputKind(operand, k, operand.format.name, alignment=1)


@dataclass(frozen=True, eq=False)
class CudaCodes:
    """Called with the arguments of ``fpc.quantize``.

    Attributes:
        operand: The format.
        places: The kernels by the types of tensors.
        reference: The operator, for what they do not take.
        flags: On the device; kernels set that of this quantizer to 1 for NaN and infinity.
        place: Which of them that is.
    """

    operand: Operand
    places: Mapping[tuple[str, ...], Place]
    reference: Function
    flags: Flags
    place: int

    @classmethod
    def of(
        cls,
        kind: InputKind,
        kernels: QuantizeKernels,
        reference: Function,
        flags: Flags,
        place: int,
    ) -> CudaCodes:
        """Return what runs a step, of which :func:`kind_of` returned the kind."""
        assert kind.operand is not None
        return cls(kind.operand, kernels.by_types(kind), reference, flags, place)

    def __call__(self, x: Tensor, *rest: Any) -> list[Tensor]:
        """Return what the operator returns."""
        found = self.places.get(type_names((x, *NOTHING)))
        kind = _kind(self.operand, x.shape[-1])
        status = self.flags.part(self.place)
        made = quantize_rows(found, kind, x, status, "", NOTHING, 0.0) if x.numel() else None
        if made is None:
            return list(self.reference(x, *rest))
        scale = made.scalar if made.token_scale is None else made.token_scale
        codes = made.codes.view(x.shape)
        shapes = [scale_shape(x.shape, level) for level in self.operand.levels]
        return [codes, *(torch.Tensor.view(scale, shape) for shape in shapes if scale is not None)]
