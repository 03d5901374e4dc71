"""A folder of Hugging Face: JSON files, and tensors in one safetensors file or in several."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from fpcompiler.errors import CheckpointError

CONFIG: Final = "config.json"
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
SHARD_BYTES: Final = 4 << 30
"""Bytes of tensors from which on a new file is begun."""


@dataclass(frozen=True)
class Kind:
    """Type and shape of a stored tensor; the type is spelled as in safetensors: ``F8_E4M3``."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        """Return both as one text."""
        return f"{self.dtype} {list(self.shape)}"


class Tensors:
    """The tensors of a folder; each is read when it is asked for.

    Args:
        folder: The folder.

    Raises:
        CheckpointError: If there are none, or a file is missing, damaged, or contradicts the index.
    """

    def __init__(self, folder: Path) -> None:
        self._handles: dict[str, Any] = {}
        self._files: dict[str, str] = {}
        self.kinds: dict[str, Kind] = {}
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such folder.")
        index = _read_index(folder)
        names = sorted({*index.values()}) if index else [SINGLE]
        for name in names:
            self._add(folder, name)
        for tensor, file in index.items():
            if self._files.get(tensor) != file:
                raise CheckpointError(
                    f"{folder / INDEX}: tensor {tensor!r} should be in {file}, but it is not. "
                    "Download the checkpoint again."
                )
        extra = sorted(self.kinds.keys() - index.keys()) if index else []
        if extra:
            raise CheckpointError(
                f"{folder / INDEX}: it does not list the tensor {extra[0]!r} of "
                f"{self._files[extra[0]]}. Download the checkpoint again."
            )

    def _add(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(
                f"{path}: the file is missing. Download the whole checkpoint; only safetensors "
                "files are read."
            )
        try:
            handle = safetensors.safe_open(path, framework="pt")
            self._handles[name] = handle
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: it is no whole safetensors file ({error}). Download it again."
            ) from error
        for tensor in self._handles[name].keys():  # noqa: SIM118 - no mapping
            if tensor in self._files:
                raise CheckpointError(
                    f"{path}: tensor {tensor!r} is in {self._files[tensor]} too; one of the files "
                    "is left over from another checkpoint."
                )
            part = self._handles[name].get_slice(tensor)
            self._files[tensor] = name
            self.kinds[tensor] = Kind(str(part.get_dtype()), tuple(part.get_shape()))

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tensor of this name."""
        return name in self.kinds

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.kinds)

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        tensor: Tensor = self._handles[self._files[name]].get_tensor(name)
        return tensor


def _read_index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor; nothing if there is one file without an index."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    files = read_json(path).get("weight_map")
    good = isinstance(files, dict) and all(isinstance(f, str) for f in files.values())
    if not good or not files:
        raise CheckpointError(f"{path}: it has no weight_map from tensors to files.")
    for file in files.values():
        if Path(file).name != file:
            raise CheckpointError(f"{path}: it names the file {file!r} outside of the folder.")
    return dict(files)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: If there is no such file, or it holds no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing; give the folder of a checkpoint.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: it is no JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: it holds no JSON object.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as Hugging Face does."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> list[Path]:
    """Write tensors to one file, or to several with an index; return the files.

    Args:
        folder: Where to. Its config is there already: these files can be read by whom it can.
        tensors: Names and values, made one at a time; what fills a file is held in memory.
    """
    shards: list[dict[str, str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            shards.append(_write_shard(folder, len(shards), shard))
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(_write_shard(folder, len(shards), shard))
    return _name_shards(folder, shards, total)


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> dict[str, str]:
    name = f"model-{number + 1:05}.tmp"
    # Tensors that share memory (tied weights) are refused by safetensors: each gets its own.
    seen: set[int] = set()
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if place in seen else tensor
        seen.add(tensors[key].untyped_storage().data_ptr())
    save_file(tensors, folder / name, metadata={"format": "pt"})
    # safetensors makes files that their owner alone can read; servers run as other users.
    shutil.copymode(folder / CONFIG, folder / name)
    return dict.fromkeys(tensors, name)


def _name_shards(folder: Path, shards: list[dict[str, str]], total: int) -> list[Path]:
    count = len(shards)
    files: list[Path] = []
    index: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = SINGLE if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
        (folder / f"model-{number + 1:05}.tmp").replace(folder / name)
        files.append(folder / name)
        index |= dict.fromkeys(shard, name)
    if count > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
        files.append(folder / INDEX)
    return files
