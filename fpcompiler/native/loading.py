"""Finding and loading the native library, and the types of its C interface (csrc/native.h)."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from fpcompiler.errors import OptionError
from fpcompiler.native import linear, program
from fpcompiler.native.structs import OperandStruct
from fpcompiler.options import Options

PATH: Final = Path(__file__).parent / "libfpc.so"
"""Where the build puts the library."""

INSTRUCTION_SETS: Final = (
    "baseline", "AVX2", "AVX2 VNNI", "AVX-512", "AVX-512 VNNI", "AVX-512 BF16",
    "NEON dot product",
)  # fmt: skip
"""What kernels are compiled for, in the order of ``FpcInstructions``; the last one is of ARM."""

EMULATED: Final = frozenset({"NEON dot product"})
"""Those whose kernels were run under emulation only, never on such a processor."""

_ABI: Final = 6
_LOG: Final = logging.getLogger("fpcompiler.numerics")


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Attributes:
        functions: Its functions, with their C types.
        instructions: The best of :data:`INSTRUCTION_SETS` that this processor has, as an index.
    """

    functions: ctypes.CDLL
    instructions: int

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.functions._name)

    def has(self, instructions: int) -> bool:
        """Return whether this processor has one of :data:`INSTRUCTION_SETS`, given as an index."""
        return bool(self.functions.fpc_has_instructions(instructions))


@lru_cache(maxsize=1)
def library() -> Library | None:
    """Return the library, or None where it is not there or ``FPC_NATIVE=0``.

    Raises:
        OptionError: If it is not there and ``FPC_NATIVE=require``, or the file that
            ``FPC_NATIVE_LIBRARY`` names does not load; the message says why.
    """
    options = Options.from_env()
    if options.native is False:
        return None
    found = load(options.native_library or PATH)
    if isinstance(found, Library):
        return found
    if options.native or options.native_library:
        name = "FPC_NATIVE=require" if options.native else "FPC_NATIVE_LIBRARY names a file"
        raise OptionError(f"{name}, but {found}.")
    # Once: the result of this function is kept.
    _LOG.warning("%s. Quantizing and multiplying with PyTorch instead, much slower.", found)
    return None


def why_missing() -> str | None:
    """Return why :func:`library` gives none; None if it gives one."""
    options = Options.from_env()
    if options.native is False:
        return "FPC_NATIVE=0 switches the native library off"
    found = load(options.native_library or PATH)
    return found if isinstance(found, str) else None


def load(path: Path) -> Library | str:
    """Return the library in a file, or why it cannot be used."""
    if not path.is_file():
        return (
            "the native library was not built: install a C++ compiler (apt-get install g++) and "
            "then fpcompiler again"
        )
    try:
        functions = ctypes.CDLL(str(path))
        abi = int(functions.fpc_abi())
    except (OSError, AttributeError) as error:
        return f"the native library {path} does not load: {error}"
    if abi != _ABI:
        return f"the native library {path} is of another version ({abi}, not {_ABI}): build again"
    functions.fpc_quantize.restype = ctypes.c_int32
    functions.fpc_quantize.argtypes = (
        ctypes.POINTER(OperandStruct),
        ctypes.c_void_p,
        ctypes.c_int32,
        *(3 * (ctypes.c_int64,)),
        *(3 * (ctypes.c_void_p,)),
        ctypes.c_int32,
        ctypes.c_int32,
    )
    linear.declare(functions)
    program.declare(functions)
    functions.fpc_read_bytes.restype = ctypes.c_uint64
    functions.fpc_read_bytes.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
    functions.fpc_peak.restype = ctypes.c_int64
    functions.fpc_peak.argtypes = (ctypes.c_int32, ctypes.c_int64, ctypes.c_int32)
    return Library(functions, int(functions.fpc_instructions()))
