"""Quantizers on a GPU: the kernel for a problem where there is one, or else torch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from fpcompiler.errors import ArtifactError, FormatError
from fpcompiler.runtime import fused
from fpcompiler.runtime.cuda.form import CudaInput, InputKind, with_scales
from fpcompiler.runtime.cuda.layers import CudaLinear
from fpcompiler.runtime.cuda.operators import open_library
from fpcompiler.runtime.cuda.problem import QuantizeProblem
from fpcompiler.runtime.cuda.stored import STORED
from fpcompiler.runtime.fused import SLOTS
from fpcompiler.runtime.native_producers import Form, ProducedForm, RowsForm, form_of_rows
from fpcompiler.runtime.operators import Function

_TYPES: Final = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_NOWHERE: Final = RowsForm(1, 0, 0)
_WITHOUT: Final = "relu"
"""Of all producers, one without tensors beside ``x``: the form of ``x`` alone is the same."""

Beside: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_NOTHING: Final[Beside] = (None, None, None, None)


@dataclass(frozen=True)
class QuantizeKernels:
    """The kernels of some libraries.

    Attributes:
        places: The library and the number in it of each problem, by the problem's text.
    """

    places: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, paths: list[Path]) -> QuantizeKernels:
        """Return the kernels of libraries. Loading one runs its code: the caller vouches for it.

        Raises:
            ArtifactError: If one is no such library.
        """
        places: dict[str, tuple[int, int]] = {}
        for path in paths:
            number = open_library(path)
            for index, text in enumerate(_problems_of(path)):
                places.setdefault(text, (number, index))
        return cls(places)

    def quantize(
        self,
        kind: InputKind,
        x: Tensor,
        status: Tensor,
        producer: str = "",
        beside: Beside = _NOTHING,
        eps: float = 0.0,
    ) -> CudaInput | None:
        """Quantize the rows of a tensor, or what a producer makes of them.

        Args:
            kind: What layers read.
            x: ``[..., K]``.
            status: int32 ``[1]``; becomes 1 if a value is NaN or infinite.
            producer: A name in :data:`fpcompiler.runtime.fused.PRODUCERS`, or empty.
            beside: The producer's weight, bias, scale and shift.
            eps: Of a norm.

        Returns:
            None if there is no kernel for it.
        """
        place = self.places.get(_text_of(kind, producer, type_names((x, *beside))))
        forms = (None if t is None else _form(t) for t in (x, *beside))
        form = None if place is None else form_of_rows(producer or _WITHOUT, *forms)
        if place is None or form is None:
            return None
        if form.stride is None:
            x = x.contiguous()
        return _launch(place, kind, x, form, status, beside, eps)


def _launch(
    place: tuple[int, int],
    kind: InputKind,
    x: Tensor,
    form: ProducedForm,
    status: Tensor,
    beside: Beside,
    eps: float,
) -> CudaInput:
    weight, bias, scale, shift = beside
    scales, shifts = form.scale or _NOWHERE, form.shift or _NOWHERE
    rows = x.numel() // kind.k
    codes, outer_scale, block_scale = torch.ops.fpc_cuda.quantize(
        *place, x, rows, kind.k, kind.k if form.stride is None else form.stride, weight, bias,
        scale, scales.repeat, scales.stride, shift, shifts.repeat, shifts.stride, eps,
        kind.row_bytes, kind.outer_count(rows), kind.block_scale_bytes(rows), kind.scale_pitch,
        status,
    )  # fmt: skip
    return with_scales(
        kind, tuple(x.shape[:-1]), rows, codes, outer_scale if kind.outer_count(1) else None,
        block_scale if kind.scale_pitch else None,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class CudaQuantizer:
    """A quantizer whose results only layers on the GPU read; called as its operator is.

    Attributes:
        linear: One of the layers; the others read the same.
        kernels: The kernels that there are.
        reference: The operator, for what they do not take; torch.compile traces it.
        scales: How many results the operator has besides the codes.
        status: int32 ``[1]`` on the device, which kernels set to 1 for NaN and infinity.
    """

    linear: CudaLinear
    kernels: QuantizeKernels
    reference: Function
    scales: int
    status: Tensor

    def __call__(self, *args: Any) -> list[Any]:
        """Return the prepared input in place of the codes, and nothing in place of the scales."""
        if torch.compiler.is_compiling():
            return list(self.reference(*args))
        return [self._prepared(*args), *(None,) * self.scales]

    def _prepared(self, *args: Any) -> CudaInput:
        values, operand, layer = args[:-2], args[-2], args[-1]
        kind, x = self.linear.kind, values[0]
        if len(values) > 1:
            weight, bias, scale, shift, producer, eps = values[1:]
            beside = weight, bias, scale, shift
            found = self.kernels.quantize(kind, x, self.status, producer, beside, eps)
            if found is not None:
                return found
            x = fused.produce(x, *beside, producer, eps, layer)
        found = self.kernels.quantize(kind, x, self.status)
        if found is not None:
            return found
        codes_and_scales = torch.ops.fpc.quantize(x, operand, layer)
        return self.linear.prepare_codes(codes_and_scales)


def type_names(tensors: Sequence[Tensor | None]) -> tuple[str, ...]:
    """Return the types of ``x`` and of a producer's tensors as problems have them: five texts."""
    names = ["" if t is None else _TYPES.get(t.dtype, "?") for t in tensors]
    return (*names, *[""] * (1 + len(SLOTS) - len(names)))


def problem_of(kind: InputKind, producer: str, types: tuple[str, ...]) -> QuantizeProblem | None:
    """Return the problem that a kernel must solve to make what layers read; None if none can.

    Args:
        kind: What layers read.
        producer: A name in :data:`fpcompiler.runtime.fused.PRODUCERS`, or empty.
        types: Of ``x`` and of the producer's weight, bias, scale and shift; empty where not given.
    """
    operand = kind.operand
    if operand is None:
        return None
    stored = "" if kind.element == operand.format.name else kind.element
    if stored not in STORED:
        return None
    try:
        first, weight, bias, scale, shift = types
        return QuantizeProblem(
            operand=operand,
            input=first,
            producer=producer,
            beside=(weight, bias, scale, shift),
            stored=stored,
            swizzled=kind.scale_pitch > 0,
        )
    except FormatError:
        return None


@lru_cache(maxsize=4096)
def _text_of(kind: InputKind, producer: str, types: tuple[str, ...]) -> str:
    return str(problem_of(kind, producer, types) or "")


def _problems_of(path: Path) -> Iterator[str]:
    """Yield what the kernels of a library compute, in order."""
    try:
        name = ctypes.CDLL(str(path)).fpc_quantize_problem
    except (OSError, AttributeError) as error:
        raise ArtifactError(f"{path} is no library of quantizers: {error}.") from error
    name.restype, name.argtypes = ctypes.c_char_p, (ctypes.c_int32,)
    index = 0
    while (text := name(index)) is not None:
        yield text.decode()
        index += 1


def _form(tensor: Tensor) -> Form:
    return Form(tuple(tensor.shape), tensor.stride(), tensor.dtype)
