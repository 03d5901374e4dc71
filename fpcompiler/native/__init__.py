"""The native library: C++ kernels behind a plain C interface, built with the package.

Everything works without it, more slowly: who calls asks :func:`library` and has another way.
"""

from fpcompiler.native.loading import (
    EMULATED,
    INSTRUCTION_SETS,
    PATH,
    Library,
    library,
    load,
    why_missing,
)

__all__ = ["EMULATED", "INSTRUCTION_SETS", "PATH", "Library", "library", "load", "why_missing"]
