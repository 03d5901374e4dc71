"""The operators that run compiled kernels, ``torch.ops.fpc_cuda``, and what torch.compile sees.

===================  ============================================================================
``open(path)``       loads a library of kernels and returns its number
``gemm(..)``         ``[m, n]``: see ``FpcGemmArguments``; ``scalar`` is a scale of all of A
``gemm_quantize(..)`` codes ``[m, bytes]`` of that, and the scales of its blocks: see
                     ``FpcQuantizingArguments``; ``status`` as below
``quantize(..)``     codes ``[m, pitch]``, ``outer`` real scales and ``blocks`` scales of a byte:
                     see ``FpcQuantizeArguments``. ``status`` becomes 1 if a value is NaN or
                     infinite, and is left alone otherwise
``attend(..)``       ``[B, M, H, D]``, of queries ``[B, H, M, D]``, keys and values
                     ``[B, G, N, D]``, which may be bytes with scales ``[B, G, N, 1]``, and a mask
                     ``[B, H, M, N]`` of truth values: see ``FpcAttendArguments``
===================  ============================================================================

Operands are packed as kernels read them (:mod:`fpcompiler.numerics.kernel_layout`). Kernels run on
the current stream; nothing is waited for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.errors import ArtifactError

VERSION: Final = 3
"""The version of the operators; ``kVersion`` of operators.cpp."""


def load_operators(path: Path) -> None:
    """Make the operators known to torch, unless they are.

    Args:
        path: The library. Loading it runs its code: the caller vouches for it.

    Raises:
        ArtifactError: If it is none, or the operators are of another version.
    """
    if not _are_there():
        try:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError) as error:
            raise ArtifactError(f"{path} holds no operators: {error}") from error
        if not _are_there():
            raise ArtifactError(f"{path} holds no operators of fpcompiler.")
        torch.library.register_fake("fpc_cuda::gemm", _fake_gemm)
        torch.library.register_fake("fpc_cuda::gemm_quantize", _fake_gemm_quantize)
        torch.library.register_fake("fpc_cuda::quantize", _fake_quantize)
        torch.library.register_fake("fpc_cuda::attend", _fake_attend)
    found = torch.ops.fpc_cuda.version()
    if found != VERSION:
        raise ArtifactError(
            f"the operators that run kernels, which this process has loaded, are of version "
            f"{found}; this fpcompiler needs version {VERSION}. Load models of one version in a "
            "process, or compile the model again."
        )


def open_library(path: Path) -> int:
    """Load a library of kernels and return its number for the operators.

    Args:
        path: The library. Loading it runs its code: the caller vouches for it.

    Raises:
        ArtifactError: If it is none, or of another version.
    """
    try:
        number: int = torch.ops.fpc_cuda.open(str(path))
    except RuntimeError as error:
        raise ArtifactError(str(error).splitlines()[0]) from error
    return number


def problem_texts(path: Path, kind: str) -> Iterator[str]:
    """Yield what the kernels of a library compute, as texts in their order.

    Args:
        path: The library. Loading it runs its code: the caller vouches for it.
        kind: What its functions are named after: ``quantize`` or ``attend``.

    Raises:
        ArtifactError: If it is no such library.
    """
    try:
        name = getattr(ctypes.CDLL(str(path)), f"fpc_{kind}_problem")
    except (OSError, AttributeError) as error:
        raise ArtifactError(f"{path} holds no kernels named {kind}: {error}.") from error
    name.restype, name.argtypes = ctypes.c_char_p, (ctypes.c_int32,)
    index = 0
    while (text := name(index)) is not None:
        yield text.decode()
        index += 1


def _are_there() -> bool:
    return hasattr(torch.ops.fpc_cuda, "version")


def _fake_gemm(
    library: int,
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    token_scale: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scalar: Tensor | None,
    alpha: float,
    m: int,
    n: int,
    k: int,
    sms: int,
    out: torch.dtype,
) -> Tensor:
    return a.new_empty((m, n), dtype=out)


def _fake_gemm_quantize(library: int, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("torch.compile traces a layer and a quantizer one by one")


def _fake_quantize(
    library: int, problem: int, x: Tensor, m: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    pitch, outer, blocks = rest[-5:-2]
    codes = x.new_empty((m, pitch), dtype=torch.uint8)
    scales = x.new_empty(outer, dtype=torch.float32)
    return codes, scales, x.new_empty(blocks, dtype=torch.uint8)


def _fake_attend(library: int, problem: int, q: Tensor, *rest: Any) -> Tensor:
    batch, heads, queries, width = q.shape
    return q.new_empty((batch, queries, heads, width))
