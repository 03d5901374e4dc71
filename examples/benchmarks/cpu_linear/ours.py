"""The linear layers of fpcompiler, and what this machine can do at best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.benchmarks.cpu_linear.problem import (
    Builder,
    NotInstalledError,
    Problem,
    Work,
)
from fpcompiler import native
from fpcompiler.native.linear import Arithmetic
from fpcompiler.numerics import quantize, quantize_packed
from fpcompiler.operand import Operand
from fpcompiler.runtime import reference
from fpcompiler.runtime.native import NativeLinear
from fpcompiler.scheme import Scheme


def quantized(scheme: str, kernel: str) -> Builder:
    """Return a builder of the layer of a scheme, bf16 in and out; it quantizes its input.

    Args:
        scheme: Its name or text.
        kernel: ``native`` or ``reference``.
    """
    layer = Scheme.parse(scheme).base
    assert layer.weight is not None
    weight_operand, x_operand = layer.weight, layer.activation
    make = {"native": _native, "reference": _reference}[kernel]

    def build(problem: Problem) -> Work:
        packed, scales = quantize_packed(problem.weight, weight_operand)
        w, k = (packed, *scales), problem.weight.shape[1]
        first = make(w, x_operand, weight_operand, k)
        size = first.weight_bytes
        count = problem.copies(size)
        layers = [first.run]
        layers += [make(w, x_operand, weight_operand, k).run for _ in range(count - 1)]
        x = problem.x.bfloat16()
        return Work(
            lambda i: layers[i](x, torch.bfloat16),
            lambda: layers[0](x, torch.bfloat16).float(),
            size,
            count,
        )

    return build


@dataclass(frozen=True)
class _Linear:
    """A layer: from an input ``[M, K]`` and the dtype of the result to ``[M, N]``."""

    run: Callable[[Tensor, torch.dtype], Tensor]
    weight_bytes: int


def _native(w: tuple[Tensor, ...], x_operand: Operand | None, operand: Operand, k: int) -> _Linear:
    _library()
    layer = NativeLinear(w, None, x_operand, operand, k, torch.bfloat16)
    return _Linear(layer, layer.nbytes)


def _reference(
    w: tuple[Tensor, ...], x_operand: Operand | None, operand: Operand, k: int
) -> _Linear:
    parts = tuple(part.clone() for part in w)

    def linear(x: Tensor, dtype: torch.dtype) -> Tensor:
        values: tuple[Tensor, ...] = (x,)
        if x_operand is not None:
            codes, scales = quantize(x, x_operand)
            values = codes, *scales
        return reference.linear(values, parts, None, x_operand, operand, k, dtype)

    return _Linear(linear, sum(part.nbytes for part in parts))


def read(problem: Problem) -> Work:
    """Build a plain read of as many bytes as the 4-bit codes of the weight take."""
    functions = _library().functions
    size = problem.weight.numel() // 2
    count = problem.copies(size)
    memory = [torch.randint(0, 255, (size,), dtype=torch.uint8) for _ in range(count)]
    return Work(
        lambda i: functions.fpc_read_bytes(memory[i].data_ptr(), size, problem.threads),
        None,
        size,
        count,
    )


def int8_peak(problem: Problem) -> Work:
    """Build as many int8 operations as the product needs, without any memory."""
    functions = _library().functions
    once = functions.fpc_peak(Arithmetic.INT8, 1, problem.threads)
    count = max(1, 2 * problem.weight.numel() * len(problem.x) // once)
    return Work(lambda i: functions.fpc_peak(Arithmetic.INT8, count, problem.threads), None, 0, 1)


def _library() -> native.Library:
    library = native.library()
    if library is None:
        raise NotInstalledError("the native library of fpcompiler is not built")
    return library
