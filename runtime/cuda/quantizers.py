"""Quantizers on a GPU: the kernel for a problem where there is one, or else torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from fpcompiler.errors import FormatError
from fpcompiler.plan import Step
from fpcompiler.runtime import fused
from fpcompiler.runtime.cuda.flags import Flags
from fpcompiler.runtime.cuda.form import CudaInput, InputKind, with_scales
from fpcompiler.runtime.cuda.layers import CudaLinear
from fpcompiler.runtime.cuda.operators import open_library, problem_texts
from fpcompiler.runtime.cuda.problem import TYPES, QuantizeProblem
from fpcompiler.runtime.cuda.stored import STORED
from fpcompiler.runtime.fused import HEADS, PRODUCERS, SLOTS, TAILS
from fpcompiler.runtime.native_producers import Form, ProducedForm, RowsForm, form_of_rows

_TYPES: Final = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_NOWHERE: Final = RowsForm(1, 0, 0)
_WITHOUT: Final = "relu"
"""Of all producers, one without tensors beside ``x``: the form of ``x`` alone is the same."""

_PRODUCER: Final = 5
"""Which argument of a fused quantizer names its producer."""

Place: TypeAlias = tuple[int, int]
"""The number of a library, and that of a problem in it."""

Beside: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NOTHING: Final[Beside] = (None, None, None, None)
"""What no producer reads."""


@dataclass(frozen=True)
class QuantizeKernels:
    """The kernels of some libraries.

    Attributes:
        places: The library and the number in it of each problem, by the problem's text.
    """

    places: Mapping[str, Place]
    _by_types: dict[tuple[InputKind, str], Mapping[tuple[str, ...], Place]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @classmethod
    def of(cls, paths: list[Path]) -> QuantizeKernels:
        """Return the kernels of libraries. Loading one runs its code: the caller vouches for it.

        Raises:
            ArtifactError: If one is no such library.
        """
        places: dict[str, Place] = {}
        for path in paths:
            number = open_library(path)
            for index, text in enumerate(problem_texts(path, "quantize")):
                places.setdefault(text, (number, index))
        return cls(places)

    def by_types(self, kind: InputKind, producer: str = "") -> Mapping[tuple[str, ...], Place]:
        """Return the kernels that make what layers read, by the types of the tensors.

        Args:
            kind: What layers read.
            producer: A name in :data:`fpcompiler.runtime.fused.PRODUCERS`, or empty.

        Returns:
            Kernels by what :func:`type_names` returns.
        """
        known = self._by_types.get((kind, producer))
        if known is None:
            texts = {types: _text_of(kind, producer, types) for types in _types_of(producer)}
            known = {t: self.places[text] for t, text in texts.items() if text in self.places}
            self._by_types[kind, producer] = known
        return known

    def quantize(
        self,
        kind: InputKind,
        x: Tensor,
        status: Tensor,
        producer: str = "",
        beside: Beside = NOTHING,
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
        place = self.by_types(kind, producer).get(type_names((x, *beside)))
        return quantize_rows(place, kind, x, status, producer, beside, eps)


def quantize_rows(
    place: Place | None,
    kind: InputKind,
    x: Tensor,
    status: Tensor,
    producer: str,
    beside: Beside,
    eps: float,
) -> CudaInput | None:
    """Quantize with a kernel that :meth:`QuantizeKernels.by_types` found; None without one.

    The other arguments are those of :meth:`QuantizeKernels.quantize`.
    """
    forms = (None if t is None else _form(t) for t in (x, *beside))
    form = None if place is None else form_of_rows(producer or _WITHOUT, *forms)
    if place is None or form is None:
        return None
    if form.stride is None:
        x = x.contiguous()
    return _launch(place, kind, x, form, status, beside, eps)


def _launch(
    place: Place,
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

    Kernels are found by the types of tensors alone, so that torch.compile can trace a call.

    Attributes:
        linear: One of the layers; the others read the same.
        plain: The kernels for values, by the types of tensors.
        produced: Those that compute the values too, of a fused quantizer.
        scales: How many results the operator has besides the codes.
        flags: On the device; kernels set that of this quantizer to 1 for NaN and infinity.
        place: Which of them that is.
    """

    linear: CudaLinear
    plain: Mapping[tuple[str, ...], Place]
    produced: Mapping[tuple[str, ...], Place]
    scales: int
    flags: Flags
    place: int

    @classmethod
    def of(
        cls, linear: CudaLinear, kernels: QuantizeKernels, step: Step, flags: Flags, place: int
    ) -> CudaQuantizer:
        """Return what runs a step of a plan, one of ``operators.QUANTIZERS``."""
        plain = kernels.by_types(linear.kind)
        is_fused = len(step.args) > _PRODUCER
        produced = kernels.by_types(linear.kind, str(step.args[_PRODUCER])) if is_fused else plain
        return cls(linear, plain, produced, len(step.outs) - 1, flags, place)

    def __call__(self, *args: Any) -> list[Any]:
        """Return the prepared input in place of the codes, and nothing in place of the scales."""
        return [self._prepared(*args), *(None,) * self.scales]

    def _prepared(self, *args: Any) -> CudaInput:
        values, operand, layer = args[:-2], args[-2], args[-1]
        kind, x, status = self.linear.kind, values[0], self.flags.part(self.place)
        if len(values) > 1:
            weight, bias, scale, shift, producer, eps = values[1:]
            beside = weight, bias, scale, shift
            place = self.produced.get(type_names((x, *beside)))
            found = quantize_rows(place, kind, x, status, producer, beside, eps)
            if found is not None:
                return found
            x = fused.produce(x, *beside, producer, eps, layer)
        place = self.plain.get(type_names((x, *NOTHING)))
        found = quantize_rows(place, kind, x, status, "", NOTHING, 0.0)
        if found is not None:
            return found
        codes_and_scales = torch.ops.fpc.quantize(x, operand, layer)
        return self.linear.prepare_codes(codes_and_scales)


@dataclass(frozen=True)
class PassOn:
    """A quantizer whose work the layer before it has done.

    Attributes:
        scales: How many results the operator has besides the codes.
    """

    scales: int

    def __call__(self, prepared: CudaInput, *args: Any) -> list[Any]:
        """Return the prepared input in place of the codes, and nothing in place of the scales."""
        return [prepared, *(None,) * self.scales]


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


def _types_of(producer: str) -> Iterator[tuple[str, ...]]:
    """Yield the types that ``x`` and a producer's tensors can have; empty where not given."""
    found = PRODUCERS.get(producer)
    read = (*HEADS[found.head], *itertools.chain(*TAILS[found.tail])) if found else ()
    return itertools.product(TYPES, *(("", *TYPES) if slot in read else ("",) for slot in SLOTS))


def _text_of(kind: InputKind, producer: str, types: tuple[str, ...]) -> str:
    return str(problem_of(kind, producer, types) or "")


def _form(tensor: Tensor) -> Form:
    return Form(tuple(tensor.shape), tensor.stride(), tensor.dtype)
