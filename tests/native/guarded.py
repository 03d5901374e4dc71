"""Memory that ends, or begins, where nothing may be touched; and processes that may crash."""

from __future__ import annotations

import ctypes
import mmap
import signal
from collections.abc import Callable
from typing import Final

from torch import Tensor

from tests.forks import exit_code

_PAGE: Final = mmap.PAGESIZE
_KNOWN: Final = 0xA5
_NOTHING, _READ = 0, 1  # PROT_NONE and PROT_READ
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Bytes between two pages that cannot be read or written.

    Args:
        size: How many.
        at_end: Whether they end where the second page begins, or begin where the first one ends.
        alignment: Of the first byte; if it does not divide ``size``, some bytes are left behind.
    """

    def __init__(self, size: int, at_end: bool, alignment: int = 1) -> None:
        self._room = max(1, -(-size // _PAGE)) * _PAGE
        self._map = mmap.mmap(-1, self._room + 2 * _PAGE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + _PAGE
        ctypes.memset(self._start, _KNOWN, self._room)
        _protect(self._start - _PAGE, _PAGE, _NOTHING)
        _protect(self._start + self._room, _PAGE, _NOTHING)
        self._before = (self._room - size) // alignment * alignment if at_end else 0
        self._size = size
        self.address = self._start + self._before

    @classmethod
    def of(cls, tensor: Tensor, at_end: bool, alignment: int = 1) -> Guarded:
        """Return a copy of a tensor that cannot be written to."""
        tensor = tensor.contiguous()
        result = cls(tensor.nbytes, at_end, alignment)
        ctypes.memmove(result.address, tensor.data_ptr(), tensor.nbytes)
        _protect(result._start, result._room, _READ)
        return result

    def read(self) -> bytes:
        """Return the bytes, after checking that those around them are as they were."""
        before = ctypes.string_at(self._start, self._before)
        rest = self._room - self._before - self._size
        after = ctypes.string_at(self.address + self._size, rest)
        assert {*before, *after} <= {_KNOWN}, "bytes around the result were written"
        return ctypes.string_at(self.address, self._size)


def _protect(address: int, size: int, protection: int) -> None:
    if _LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection):
        raise OSError(ctypes.get_errno(), "mprotect failed")


def survives(work: Callable[[], object]) -> None:
    """Do the work in a copy of this process, and check that it neither crashes nor raises."""
    code = exit_code(work)
    assert code == 0, f"killed by {signal.Signals(-code).name}" if code < 0 else "it failed"
