"""MLIR contexts with every dialect that a program needs."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import TYPE_CHECKING

from fpcompiler.errors import DependencyError

if TYPE_CHECKING:
    from torch_mlir import ir


def require_torch_mlir() -> None:
    """Check that the compiler's dependency is installed.

    Raises:
        DependencyError: If it is not; the message names the command that installs it.
    """
    if importlib.util.find_spec("torch_mlir") is None:
        raise DependencyError(
            "Compiling needs the package torch-mlir, which is not installed. Run: "
            "pip install 'fpcompiler[compiler]'. (Loading and running artifacts does not need it.)"
        )


def _declare_bindings(*dialects: str) -> None:
    """Give dialects that have no Python bindings an empty module of them.

    The bindings look for one whenever they meet an operation, and a search that finds nothing is
    not remembered: it took two thirds of the time of all passes.
    """
    for name in dialects:
        full = f"torch_mlir.dialects.{name}"
        sys.modules.setdefault(full, types.ModuleType(full))


def new_context() -> ir.Context:
    """Return a context with the torch, torch_c, ml_program, func and fpq dialects loaded."""
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.passmanager import PassManager

    import fpcompiler.ir.fused_quantize
    import fpcompiler.ir.linear  # noqa: F401  (operations of the dialect)
    from fpcompiler.ir.dialect import Fpq

    _declare_bindings("torch_c", "fpq")
    context = ir.Context()
    # Verifiers written in Python hold the interpreter lock: threads would only wait for it.
    context.enable_multithreading(False)
    torch_dialect.register_dialect(context)
    with context, ir.Location.unknown():
        Fpq.load()
        # torch_c is registered but loaded only by a pass that depends on it.
        loader = PassManager.parse("builtin.module(torch-func-backend-type-conversion)")
        loader.run(ir.Module.create().operation)
    return context
