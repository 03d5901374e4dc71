"""What work has found, kept on disk for a run that resumes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Result = Mapping[str, Tensor]
"""What work returns: tensors by name."""


class Results:
    """Results in a folder, one file for each work.

    Args:
        folder: Is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def has(self, name: str) -> bool:
        """Return whether there is a result that can be read; a run can be killed by a full disk."""
        try:
            self.read(name)
        except (OSError, SafetensorError):
            return False
        return True

    def write(self, name: str, result: Result) -> None:
        """Keep a result."""
        path = self._path(name)
        unfinished = path.with_suffix(".tmp")
        save_file({key: value.clone().contiguous() for key, value in result.items()}, unfinished)
        os.replace(unfinished, path)

    def read(self, name: str) -> Result:
        """Return what :meth:`write` kept."""
        with safe_open(self._path(name), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
