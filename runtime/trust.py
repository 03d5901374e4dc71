"""Which compiled kernels of an artifact are loaded: a library is code of whoever wrote the file.

A library is loaded if the user says so (``trust=True``), or if the same bytes were built on this
machine, by this user: then the hash of the library is found in the folder of compiled kernels. Any
other is built again from the description of its problem, and what was built is loaded in its place.
If the bytes differ, that is told. It means something where one source and one compiler give the
same bytes: not for CUTLASS's kernels, in which nvcc names things after the folder of the source.

Loaded files are copies under the name of their hash, in a folder that only the user can write to.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from fpcompiler.artifact.kernels import Instance
from fpcompiler.errors import ArtifactError, FpcompilerError, OptionError
from fpcompiler.options import Options

_LOG: Final = logging.getLogger("fpcompiler.runtime")
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

_SAME_BYTES: Final = (
    "Other versions of the compilers explain that; otherwise distrust the artifact."
)
_OTHER_BYTES: Final = "Builds of CUTLASS's kernels always differ, so that this says nothing."

Rebuild: TypeAlias = Callable[[Instance, Options], Path]
"""Builds a library from the description of its problem and returns its path."""


@dataclass(frozen=True)
class Gatekeeper:
    """Decides which libraries are loaded, and puts them where they are loaded from.

    Attributes:
        options: Where compiled kernels are kept.
        trust: Whether every library is loaded as it is.
        rebuild: Builds a library again; by default the code generator does.
    """

    options: Options
    trust: bool = False
    rebuild: Rebuild | None = None

    def admit(self, instance: Instance, data: bytes) -> Path:
        """Return the file to load for an instance, written if it is not there.

        Args:
            instance: What it is.
            data: The library, from an artifact.

        Raises:
            ArtifactError: If the library is not the one of the index, or is not trusted and cannot
                be built again.
            OptionError: If others can write to the folder of compiled kernels.
        """
        if _sha256(data) != instance.sha256:
            raise ArtifactError(
                f"the library of {instance.name} is not the one that its index names: the artifact "
                "was changed. Compile the model again."
            )
        if not self.trust and not self.was_built_here(instance.sha256):
            data = self._built_again(instance)
        return self._stored(data)

    def was_built_here(self, sha256: str) -> bool:
        """Return whether a library with this hash is in the folder of compiled kernels.

        Raises:
            OptionError: If others can write to that folder, so that this would prove nothing.
        """
        folder = self.options.cache / "kernels"
        if not folder.is_dir():
            return False
        _require_private(folder)
        return any(
            _named_hash(built) == sha256 == _sha256((built / "kernel.so").read_bytes())
            for built in folder.iterdir()
            if (built / "kernel.so").is_file()
        )

    def _built_again(self, instance: Instance) -> bytes:
        _LOG.warning(
            "%s was compiled elsewhere and is not trusted: it is compiled again here.",
            instance.name,
        )
        try:
            path = (self.rebuild or _rebuild)(instance, self.options)
        except (FpcompilerError, ImportError) as error:
            raise ArtifactError(
                f"the kernels {instance.name} in this artifact are code of whoever wrote the file. "
                f"They were not built on this machine, and cannot be built again here: {error} "
                "Load the model with trust=True if you trust its origin, or with kernels=False to "
                "run it without them."
            ) from error
        data = path.read_bytes()
        if _sha256(data) != instance.sha256:
            _LOG.warning(
                "%s: the library in the artifact differs from the one built here, which is used. "
                "%s",
                instance.name,
                _SAME_BYTES if instance.role != "gemm" or instance.is_packed else _OTHER_BYTES,
            )
        return data

    def _stored(self, data: bytes) -> Path:
        folder = self.options.cache / "loaded"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_private(folder)
            path = folder / f"{_sha256(data)}.so"
            if not path.is_file() or path.read_bytes() != data:
                _write(path, data)
        except OSError as error:
            raise OptionError(
                f"kernels cannot be kept in {folder}: {error.strerror}. Point FPC_CACHE to a "
                "folder that can be written."
            ) from error
        return path


def _write(path: Path, data: bytes) -> None:
    """Write a file under its name at once; one that is loaded stays as it is for its process."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)  # readable by its owner only
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


def _require_private(folder: Path) -> None:
    """Refuse a folder whose files others can change or replace."""
    folder = folder.resolve()
    own = folder.stat()
    if own.st_uid != os.geteuid() or own.st_mode & _OTHERS_WRITE:
        raise _not_private(folder, folder)
    for parent in folder.parents:
        status = parent.stat()
        # In a sticky folder, such as /tmp, nobody else can rename what is the user's.
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            raise _not_private(folder, parent)


def _not_private(folder: Path, culprit: Path) -> OptionError:
    return OptionError(
        f"compiled kernels are not loaded from {folder}: others can write to {culprit}. Take that "
        f"right away (chmod go-w {culprit}), or point FPC_CACHE to a folder of your own."
    )


def _named_hash(built: Path) -> str:
    """Return what the record of a build says; reading all libraries would take longer."""
    try:
        return str(json.loads((built / "metadata.json").read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _rebuild(instance: Instance, options: Options) -> Path:
    # By name: the runtime works without the compiler, and asks for it here only.
    module = importlib.import_module("fpcompiler.codegen.rebuild")
    path: Path = module.rebuild(instance.role, instance.problem, options)
    return path


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
