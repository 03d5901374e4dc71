"""Tensor files: inputs and outputs of models as ``.safetensors`` or ``.npz``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpcompiler.errors import OptionError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Inputs", "read_inputs", "read_tensors", "write_tensors", "named_tensors", "file_kind",
]  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Inputs:
        """Return the same call with its tensors on a device."""
        args = tuple(_to(value, device) for value in self.args)
        return Inputs(args, {name: _to(value, device) for name, value in self.kwargs.items()})


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_to(entry, device) for entry in value)
    if isinstance(value, dict):
        return {name: _to(entry, device) for name, entry in value.items()}
    return value.to(device) if hasattr(value, "to") else value


def read_inputs(path: str) -> Inputs:
    """Return the call that a tensor file describes.

    Tensors named by numbers (``0``, ``arg1``, ``arr_0`` of :func:`numpy.savez`) are positional
    arguments in the order of the numbers; other names are keyword arguments.

    Raises:
        OptionError: If the file is missing, damaged or of another kind.
    """
    tensors = read_tensors(path)
    numbered = {name: re.fullmatch(r"(?:arg|arr|input)?_?(\d+)", name) for name in tensors}
    positions = {int(match[1]): name for name, match in numbered.items() if match}
    if sorted(positions) != list(range(len(positions))):
        raise OptionError(f"{path}: the numbered tensors {sorted(positions)} do not count from 0.")
    args = tuple(tensors[positions[index]] for index in sorted(positions))
    return Inputs(args, {name: tensors[name] for name, match in numbered.items() if not match})


def read_tensors(file: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name.

    Raises:
        OptionError: If the file is missing, damaged or of another kind.
    """
    import numpy as np
    import safetensors
    import safetensors.torch
    import torch

    path = Path(file)
    kind = file_kind(path)
    if not path.is_file():
        raise OptionError(f"there is no file {path}.")
    try:
        if kind == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (safetensors.SafetensorError, ValueError, OSError, TypeError) as error:
        raise OptionError(f"{path} does not read as {kind}: {error}") from None


def write_tensors(path: str, value: object) -> list[str]:
    """Write the tensors of a nested value to a file and return their names in it.

    Raises:
        OptionError: If the file is of an unknown kind or cannot hold the tensors.
    """
    import safetensors.torch
    import torch

    target = Path(path)
    tensors = dict(named_tensors(value))
    if file_kind(target) == ".safetensors":
        # A view may share memory with another output, which safetensors refuses: write copies.
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        safetensors.torch.save_file({k: v.contiguous() for k, v in copies.items()}, target)
        return list(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype is torch.bfloat16:
            raise OptionError(f"{path}: .npz cannot hold the bfloat16 {name}; use .safetensors.")
    _save_npz(target, tensors)
    return list(tensors)


def _save_npz(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    import numpy as np

    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def named_tensors(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a nested value with its name: ``logits``, ``0``, ``past.3.1``."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name or "output", value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    for key, entry in items:
        yield from named_tensors(entry, f"{name}.{key}" if name else str(key))


def file_kind(path: str | Path) -> str:
    """Return ``.safetensors`` or ``.npz``.

    Raises:
        OptionError: If the name of the file ends in neither.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise OptionError(f"{path}: tensor files end with .safetensors or .npz.")
    return path.suffix
