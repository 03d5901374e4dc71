"""Compile a PyTorch model into one that runs in 4- and 6-bit floating point.

import fpcompiler

compiled = fpcompiler.compile(model, scheme="w4a6")
y = compiled(x)
compiled.save("model.fpc")
same = fpcompiler.load("model.fpc")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fpcompiler.errors import FpcompilerError
from fpcompiler.formats import FORMATS

if TYPE_CHECKING:
    from fpcompiler.api import compile, load
    from fpcompiler.importing import convert, import_checkpoint
    from fpcompiler.recording import record
    from fpcompiler.runtime.model import CompiledModel

__all__ = [
    "compile",
    "load",
    "record",
    "import_checkpoint",
    "convert",
    "CompiledModel",
    "FORMATS",
    "FpcompilerError",
    "__version__",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used: the command line answers --help without."""
    if name in ("compile", "load"):
        from fpcompiler import api

        return getattr(api, name)
    if name in ("import_checkpoint", "convert"):
        from fpcompiler import importing

        return getattr(importing, name)
    if name == "record":
        from fpcompiler.recording import record

        return record
    if name == "CompiledModel":
        from fpcompiler.runtime.model import CompiledModel

        return CompiledModel
    raise AttributeError(f"module 'fpcompiler' has no attribute {name!r}")
