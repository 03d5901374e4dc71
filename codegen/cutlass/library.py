"""A compiled GEMM, opened on a machine with or without a GPU, to ask it about itself."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any, Final

from fpcompiler.errors import TargetError

__all__ = ["GemmLibrary", "GEMM_ABI"]

GEMM_ABI: Final = 1
"""The version of the C interface in ``templates/kernel_abi.h``."""

_I32: Final = ctypes.c_int32
_I64: Final = ctypes.c_int64
_SIGNATURES: Final = {
    "fpc_gemm_abi": (_I32, []),
    "fpc_gemm_description": (ctypes.c_char_p, []),
    "fpc_gemm_smem": (_I64, []),
    "fpc_gemm_can_implement": (_I32, [_I32] * 3),
    "fpc_gemm_workspace": (_I64, [_I32] * 4),
    "fpc_gemm_scale_bytes_a": (_I64, [_I32] * 3),
    "fpc_gemm_scale_bytes_b": (_I64, [_I32] * 3),
    "fpc_gemm_scale_index_a": (_I64, [_I32] * 5),
    "fpc_gemm_scale_index_b": (_I64, [_I32] * 5),
}


class GemmLibrary:
    """The functions of a compiled GEMM that need no GPU.

    Opening a library runs code of it: open those only that were built here, or that are trusted.
    """

    def __init__(self, path: Path) -> None:
        """Open a library.

        Args:
            path: The file.

        Raises:
            TargetError: If it is none of ours, or of another version of the interface.
        """
        try:
            self._library = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise TargetError(f"{path} is no GEMM of fpcompiler: {error}") from error
        if (abi := self._library.fpc_gemm_abi()) != GEMM_ABI:
            raise TargetError(
                f"{path} has version {abi} of the kernel interface, this program {GEMM_ABI}; "
                "compile the model again."
            )

    @property
    def description(self) -> dict[str, Any]:
        """The instance that it was generated from."""
        found: dict[str, Any] = json.loads(self._library.fpc_gemm_description())
        return found

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory per thread block."""
        return int(self._library.fpc_gemm_smem())

    def can_implement(self, m: int, n: int, k: int) -> bool:
        """Return whether the kernel computes these sizes."""
        return int(self._library.fpc_gemm_can_implement(m, n, k)) == 0

    def workspace(self, m: int, n: int, k: int, sm_count: int) -> int:
        """Return the bytes of workspace that a call needs on a GPU with so many SMs."""
        return int(self._library.fpc_gemm_workspace(m, n, k, sm_count))

    def scale_bytes(self, m: int, n: int, k: int) -> tuple[int, int]:
        """Return the bytes of the block scales of A and of B."""
        sizes = (m, n, k)
        a = self._library.fpc_gemm_scale_bytes_a(*sizes)
        return int(a), int(self._library.fpc_gemm_scale_bytes_b(*sizes))

    def scale_index_a(self, m: int, n: int, k: int, row: int, column: int) -> int:
        """Return the byte with the scale of A's value at a row and an input; -1 without scales."""
        return int(self._library.fpc_gemm_scale_index_a(m, n, k, row, column))

    def scale_index_b(self, m: int, n: int, k: int, row: int, column: int) -> int:
        """Return the byte with the scale of B's value at a row and an input; -1 without scales."""
        return int(self._library.fpc_gemm_scale_index_b(m, n, k, row, column))
