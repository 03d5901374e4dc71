"""Kernels as sources and as libraries, whoever generated them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpcompiler.errors import ArtifactError

__all__ = ["KernelSource", "BuiltKernel", "refusing_descriptions"]


@contextlib.contextmanager
def refusing_descriptions(values: object) -> Iterator[None]:
    """Turn what goes wrong when a description from a file is read into an error for users.

    Raises:
        ArtifactError: If a key is missing, or a value is of a wrong type or no valid one.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{values!r:.300} describes no kernel of this version ({error}); compile the model "
            "again."
        ) from error


@dataclass(frozen=True)
class KernelSource:
    """CUDA C++ that compiles to one shared library.

    Attributes:
        name: For people and file names.
        text: The source. All but the headers below is in it.
        arch: The architecture that it is for, such as ``sm_100a``.
        include: Folders of headers.
        headers: What those folders hold, such as ``nvidia-cutlass 4.2.0.0``: it is part of the
            key, the folders are not.
        description: What the kernel computes, for its metadata; JSON values only.
    """

    name: str
    text: str
    arch: str
    include: tuple[Path, ...] = ()
    headers: str = ""
    description: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def key(self, flags: tuple[str, ...], toolchain: str) -> str:
        """Return the name of what comes out: a hash of all that it depends on.

        Args:
            flags: Flags of the compiler, without folders.
            toolchain: Names and versions of the compilers.
        """
        parts = (self.text, self.arch, self.headers, *flags, toolchain)
        digest = hashlib.sha256()
        for part in parts:
            data = part.encode()
            # With lengths, so that no two lists of parts give the same bytes.
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class BuiltKernel:
    """A compiled kernel in the cache.

    Attributes:
        path: The shared library.
        metadata: What ``metadata.json`` beside it holds: ``name``, ``arch``, ``description``,
            ``key``, ``sha256`` of the library, ``toolchain``, ``headers``, ``flags``,
            ``resources`` (of each GPU function) and ``cost`` (seconds of CPU, peak memory in MB).
        cached: Whether it was there before.
    """

    path: Path
    metadata: Mapping[str, Any]
    cached: bool

    @property
    def folder(self) -> Path:
        """The folder with the library, its object file, source, log and metadata."""
        return self.path.parent

    @property
    def source(self) -> Path:
        """The source it was compiled from."""
        return self.folder / "kernel.cu"

    @property
    def object(self) -> Path:
        """The object file, which links with a runtime library other than the static one."""
        return self.folder / "kernel.o"

    @property
    def log(self) -> Path:
        """What the compiler printed."""
        return self.folder / "build.log"
