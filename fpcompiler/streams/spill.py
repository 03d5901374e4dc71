"""What lies between the pieces of a graph, kept on disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fpcompiler.streams.segments import Environment

_SCALARS: Final = "scalars"
_STRIDES: Final = "strides"


def _laid_out(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """Return a copy with the strides that a value had: the last bits of products depend on them."""
    empty = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return empty.copy_(tensor)


class Spill:
    """Environments in a folder, one file for each batch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, piece: int, batch: int, environment: Environment) -> None:
        """Keep what a piece left for a batch."""
        folder = self._piece(piece)
        folder.mkdir(parents=True, exist_ok=True)
        # Cloned, because values that share memory (views) must be written on their own.
        tensors = {k: v.clone() for k, v in environment.items() if isinstance(v, Tensor)}
        scalars = {k: v for k, v in environment.items() if k not in tensors}
        strides = {k: v.stride() for k, v in tensors.items()}
        path = self._file(piece, batch)
        unfinished = path.with_suffix(".tmp")
        metadata = {_SCALARS: json.dumps(scalars), _STRIDES: json.dumps(strides)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, unfinished, metadata=metadata)
        os.replace(unfinished, path)

    def read(self, piece: int, batch: int, device: torch.device) -> Environment:
        """Return what :meth:`write` kept."""
        with safe_open(self._file(piece, batch), framework="pt", device=str(device)) as file:
            metadata = file.metadata()
            strides = json.loads(metadata[_STRIDES])
            values: Environment = {
                key: _laid_out(file.get_tensor(key), stride) for key, stride in strides.items()
            }
            values |= json.loads(metadata[_SCALARS])
        return values

    def has(self, piece: int, batch: int) -> bool:
        """Return whether what a piece left can be read; a run can be killed by a full disk."""
        try:
            self.read(piece, batch, torch.device("cpu"))
        except (OSError, SafetensorError):
            return False
        return True

    def forget(self, piece: int) -> None:
        """Delete what a piece left."""
        shutil.rmtree(self._piece(piece), ignore_errors=True)

    def forget_all_but(self, piece: int) -> None:
        """Delete what other pieces left, in a run that was killed."""
        for folder in self._folder.glob("piece-*"):
            if folder != self._piece(piece):
                shutil.rmtree(folder)

    def forget_all(self) -> None:
        """Delete everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _piece(self, piece: int) -> Path:
        return self._folder / f"piece-{piece:04}"

    def _file(self, piece: int, batch: int) -> Path:
        return self._piece(piece) / f"batch-{batch:05}.safetensors"
