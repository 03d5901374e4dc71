"""Proof records of compiled kernels, each made once and kept beside the kernels."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from fpcompiler.codegen.kernel import BuiltKernel
from fpcompiler.codegen.proof.prove import prove
from fpcompiler.options import Options

__all__ = ["recorded_proof"]

_PACKAGES: Final = (
    "torch", "nvidia-cutlass", "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm",
    "nvidia-cutlass-dsl", "nvidia-cutlass-operators",
)  # fmt: skip


def recorded_proof(kernel: BuiltKernel, options: Options) -> dict[str, Any]:
    """Return the record of all checks of a kernel as JSON values.

    A record that was made before of the same library by the same checks is read again.

    Args:
        kernel: A compiled GEMM.
        options: Where compiled kernels are kept.

    Raises:
        TargetError: If the library is none of ours.
    """
    folder = options.cache / "proofs"
    path = folder / f"{kernel.metadata['sha256'][:32]}-{_checks()}.json"
    found = _read(path)
    if found is not None:
        return found
    record = prove(kernel, options=options).to_json()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=folder, suffix=".tmp", delete=False
    ) as file:
        json.dump(record, file, indent=1)
    os.replace(file.name, path)
    return record


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there, or damaged
    return found


@lru_cache(maxsize=1)
def _checks() -> str:
    """Return a hash of the checks' own sources and of the tools they use.

    With another version of them, or with a tool that was missing, kernels are checked again.
    """
    programs = [shutil.which(name) or "" for name in ("g++", "cuobjdump", "nvdisasm")]
    versions = [_version(name) for name in _PACKAGES]
    digest = hashlib.sha256("\0".join([*programs, *versions]).encode())
    for path in sorted(Path(__file__).parent.iterdir()):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
