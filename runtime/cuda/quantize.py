"""Kernels that quantize activations, called with tensors of PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fpcompiler.errors import ArtifactError, NumericsError
from fpcompiler.runtime.cuda.problem import TYPES, QuantizeProblem
from fpcompiler.runtime.native_producers import Form, ProducedForm, RowsForm, form_of_rows

_TORCH_TYPES: Final = dict(zip(TYPES, (torch.float32, torch.float16, torch.bfloat16), strict=True))
_REFUSED: Final = -1
_NO_ROWS: Final = RowsForm(1, 0, 0)
_ATOM: Final = (128, 4)


class Beside(ctypes.Structure):
    """``FpcBeside`` of codegen/cuda/arguments.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("repeat", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


class Arguments(ctypes.Structure):
    """``FpcQuantizeArguments`` of codegen/cuda/arguments.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", Beside),
        ("shift", Beside),
        ("eps", ctypes.c_float),
        ("codes", ctypes.c_void_p),
        ("pitch", ctypes.c_int64),
        ("outer_scale", ctypes.c_void_p),
        ("block_scale", ctypes.c_void_p),
        ("scale_pitch", ctypes.c_int64),
        ("amax", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
    )


class Quantized(NamedTuple):
    """Memory that a kernel writes, all on the device of its input.

    Attributes:
        codes: uint8 ``[M, pitch]``; behind the codes of a row there are zeros.
        outer_scale: fp32 ``[M]`` per row, ``[1]`` per tensor, empty without. With integers,
            ``[2 * M]``: behind the scales of rows stand the bits of their sums, int32.
        block_scale: ``[M, blocks]``, or swizzled, one axis; fp32 for real scales, otherwise uint8.
        amax: int32 ``[1]`` that a kernel needs for itself.
        status: int32 ``[1]``. A kernel sets it to 1 if a value is NaN or infinite, and no kernel
            sets it to 0, so that one look is enough for many launches.
    """

    codes: Tensor
    outer_scale: Tensor
    block_scale: Tensor
    amax: Tensor
    status: Tensor

    @classmethod
    def empty(
        cls,
        problem: QuantizeProblem,
        m: int,
        k: int,
        device: torch.device | str,
        pitch: int | None = None,
    ) -> Quantized:
        """Return memory for ``m`` rows of ``k`` values.

        Args:
            problem: What is computed.
            m: Rows.
            k: Values in a row.
            device: Where.
            pitch: Bytes from one row of codes to the next; by default as many as the codes take.
        """
        block = problem.operand.block
        columns = problem.scale_count(k)
        shape: tuple[int, ...] = (m, columns)
        if problem.swizzled:
            rows, width = (
                -(-size // unit) * unit for size, unit in zip((m, columns), _ATOM, strict=True)
            )
            shape = (rows * width,)
        real = block is not None and block.is_real
        return cls(
            torch.empty(m, pitch or problem.row_bytes(k), dtype=torch.uint8, device=device),
            torch.ones(problem.outer_count(m), device=device),
            torch.empty(shape, dtype=torch.float32 if real else torch.uint8, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )


class QuantizeLibrary:
    """A library of kernels, one for each of some problems.

    Args:
        path: The library. Loading it runs its code: the caller vouches for it.
        problems: What it was generated from, in order.

    Raises:
        ArtifactError: If it is no such library, or was generated from other problems.
    """

    def __init__(self, path: Path, problems: Sequence[QuantizeProblem]) -> None:
        self.problems = tuple(problems)
        try:
            self._library = ctypes.CDLL(str(path))
            name, self._launch = self._library.fpc_quantize_problem, self._library.fpc_quantize_rows
        except (OSError, AttributeError) as error:
            raise ArtifactError(f"{path} is no library of quantizers: {error}.") from error
        name.restype, name.argtypes = ctypes.c_char_p, (ctypes.c_int32,)
        self._launch.restype = ctypes.c_int32
        self._launch.argtypes = (ctypes.c_int32, ctypes.POINTER(Arguments), ctypes.c_void_p)
        for index, problem in enumerate(self.problems):
            found = name(index)
            if found is None or found.decode() != str(problem):
                raise ArtifactError(f"{path}: kernel {index} is {found!r}, not {str(problem)!r}.")

    def launch(self, index: int, arguments: Arguments, stream: int) -> None:
        """Launch a kernel. Nothing is allocated or waited for.

        Args:
            index: Of the problem.
            arguments: Of the kernel.
            stream: A ``cudaStream_t``.

        Raises:
            NumericsError: If the sizes are impossible, or CUDA refuses the launch.
        """
        result = self._launch(index, ctypes.byref(arguments), stream)
        if result == _REFUSED:
            raise NumericsError(
                f"the kernel {self.problems[index]} does not take {arguments.m} rows of "
                f"{arguments.k} values with {arguments.pitch} bytes for the codes of a row."
            )
        if result:
            raise NumericsError(
                f"CUDA error {result} at the launch of {self.problems[index]}; was it compiled for "
                f"this GPU?{self._said(result)}"
            )

    def _said(self, error: int) -> str:
        """Return what CUDA calls an error, if the library tells it."""
        text = getattr(self._library, "fpc_cuda_error_text", None)
        if text is None:
            return ""
        text.restype, text.argtypes = ctypes.c_char_p, (ctypes.c_int32,)
        return f" ({text(error).decode()})"

    def quantize(
        self,
        index: int,
        x: Tensor,
        out: Quantized,
        *,
        beside: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None,) * 4,
        eps: float = 0.0,
    ) -> None:
        """Quantize the rows of a tensor on the current stream.

        Args:
            index: Of the problem.
            x: ``[..., K]`` on a GPU.
            out: What is written; a scale of the tensor that is given is read from it.
            beside: The producer's weight, bias, scale and shift.
            eps: Of a norm.

        Raises:
            NumericsError: If a tensor does not fit the problem, or the launch fails.
        """
        stream = torch.cuda.current_stream(x.device).cuda_stream
        self.launch(index, arguments_of(self.problems[index], x, out, beside, eps), stream)


def arguments_of(
    problem: QuantizeProblem,
    x: Tensor,
    out: Quantized,
    beside: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None,) * 4,
    eps: float = 0.0,
) -> Arguments:
    """Return tensors as a kernel takes them. They must live until it has run.

    The arguments are those of :meth:`QuantizeLibrary.quantize`.

    Raises:
        NumericsError: If a tensor does not fit the problem.
    """
    form = _form_of(problem, x, beside)
    k = x.shape[-1]
    m = x.numel() // k if k else 0
    if out.codes.shape[0] != m or out.codes.shape[1] < problem.row_bytes(k):
        raise NumericsError(f"{list(out.codes.shape)} bytes do not hold {m} rows of {k} codes.")
    weight, bias, scale, shift = beside
    return Arguments(
        x=x.data_ptr(), m=m, k=k, stride=form.stride,
        weight=_address(weight), bias=_address(bias),
        scale=_rows(scale, form.scale), shift=_rows(shift, form.shift), eps=eps,
        codes=out.codes.data_ptr(), pitch=out.codes.stride(0),
        outer_scale=out.outer_scale.data_ptr(), block_scale=out.block_scale.data_ptr(),
        scale_pitch=problem.scale_count(k), amax=out.amax.data_ptr(), status=out.status.data_ptr(),
    )  # fmt: skip


def _form_of(
    problem: QuantizeProblem, x: Tensor, beside: tuple[Tensor | None, ...]
) -> ProducedForm:
    found = tuple("" if t is None else _name(t) for t in beside)
    if _name(x) != problem.input or found != problem.beside:
        raise NumericsError(f"{problem} does not read {_name(x)} and {found}.")
    # Of all producers, one without tensors beside x has the form of x alone.
    producer = problem.producer or "relu"
    form = form_of_rows(producer, *(None if t is None else _form(t) for t in (x, *beside)))
    if form is None or form.stride is None:
        raise NumericsError(f"{problem}: rows must lie in memory at equal distances.")
    return form


def _form(tensor: Tensor) -> Form:
    return Form(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _name(tensor: Tensor) -> str:
    return next((name for name, dtype in _TORCH_TYPES.items() if dtype == tensor.dtype), "")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor | None, form: RowsForm | None) -> Beside:
    repeat, stride, _ = form or _NO_ROWS
    return Beside(_address(tensor), repeat, stride)
