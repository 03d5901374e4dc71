"""The library of operators that run compiled kernels.

It does not depend on a target, so that it travels in artifacts beside the kernels.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Final

from fpcompiler.codegen.host_library import FLAGS, HostLibrary
from fpcompiler.options import Options

__all__ = ["build_operators", "operators_source", "OPERATORS"]

OPERATORS: Final = "operators"
"""The role of the library among the kernels of an artifact, and its name there."""

_FLAGS: Final = FLAGS
_PARTS: Final = (
    ("fpcompiler.codegen.cuda", "arguments.h"),
    ("fpcompiler.codegen.attention", "attention.h"),
    ("fpcompiler.codegen.cutlass", "templates/kernel_abi.h"),
    ("fpcompiler.codegen.cutlass", "templates/quantize_abi.h"),
    ("fpcompiler.runtime.cuda", "operators.cpp"),
)


def operators_source() -> str:
    """Return the source, with the interfaces of the kernels in it."""
    texts = [resources.files(package).joinpath(name).read_text("utf-8") for package, name in _PARTS]
    own = [line for line in texts[-1].splitlines() if not line.startswith('#include "')]
    headers = [text.replace("#pragma once\n", "") for text in texts[:-1]]
    return "\n".join([*headers, *own, ""])


def build_operators(options: Options | None = None) -> Path:
    """Return the library, compiled if it is not there.

    Args:
        options: Where compiled kernels are; by default as the environment says.

    Raises:
        DependencyError: If there is no g++, or it does not compile the source.
        OptionError: If the folder of compiled kernels cannot be written.
    """
    return HostLibrary(OPERATORS, "run kernels", operators_source(), _FLAGS).build(options)
