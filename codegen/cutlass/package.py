"""The package ``nvidia-cutlass``: its generator and its headers."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from fpcompiler.errors import DependencyError

__all__ = ["Cutlass", "CUTLASS_VERSION", "find_cutlass"]

CUTLASS_VERSION: Final = "4.2.0.0"
"""The version of ``nvidia-cutlass`` that kernels are generated with."""

_INSTALL: Final = (
    f"pip install --no-deps nvidia-cutlass=={CUTLASS_VERSION} installs the generator and the "
    "headers; fpcompiler[cuda] asks for it too."
)


@dataclass(frozen=True)
class Cutlass:
    """An installed ``nvidia-cutlass``.

    Attributes:
        version: Its version.
        root: The folder with ``include`` and ``tools``.
        library: The module ``cutlass_library.library`` (enumerations, descriptors).
        gemm: The module ``cutlass_library.gemm_operation`` (the operation and its emitter).
    """

    version: str
    root: Path
    library: ModuleType
    gemm: ModuleType

    @property
    def include(self) -> tuple[Path, ...]:
        """Folders for nvcc's ``-I``."""
        return self.root / "include", self.root / "tools" / "util" / "include"


def find_cutlass() -> Cutlass:
    """Return the installed package.

    Raises:
        DependencyError: If it is not installed, or in another version.
    """
    try:
        version = importlib.metadata.version("nvidia-cutlass")
        package = importlib.import_module("cutlass_library")
    except ImportError as error:  # PackageNotFoundError is one
        raise DependencyError(
            f"The package nvidia-cutlass, which writes CUDA kernels, is not installed. {_INSTALL}"
        ) from error
    if version != CUTLASS_VERSION:
        raise DependencyError(
            f"nvidia-cutlass {version} is installed; kernels are generated with {CUTLASS_VERSION}, "
            f"whose templates they were checked with. {_INSTALL}"
        )
    root = Path(str(package.__file__)).parent / "source"
    if not (root / "include" / "cutlass" / "cutlass.h").is_file():
        raise DependencyError(f"nvidia-cutlass has no headers in {root}. {_INSTALL}")
    library = importlib.import_module("cutlass_library.library")
    return Cutlass(
        version, root, library, importlib.import_module("cutlass_library.gemm_operation")
    )
