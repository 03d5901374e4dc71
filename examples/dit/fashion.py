"""Fashion-MNIST: 60,000 and 10,000 pictures of clothes in ten classes (arXiv 1708.07747)."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor

from fpcompiler.errors import DependencyError

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist puts its files."""

CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip


def pictures(part: str = "train", folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Return pictures, uint8 ``[N, 28, 28]``, and their classes, int64 ``[N]``.

    Args:
        part: ``train`` or ``t10k``.
        folder: Where the files are.

    Raises:
        DependencyError: If they are not there.
    """
    return _read(folder / f"{part}-images-idx3-ubyte.gz", 16).view(-1, 28, 28), _read(
        folder / f"{part}-labels-idx1-ubyte.gz", 8
    ).long()


def scaled(images: Tensor) -> Tensor:
    """Return uint8 pictures ``[N, 28, 28]`` as fp32 ``[N, 1, 28, 28]`` in -1 to 1."""
    return images[:, None].float() / 127.5 - 1


def _read(path: Path, header: int) -> Tensor:
    if not path.is_file():
        raise DependencyError(
            f"there is no {path}. Run: apt-get install dataset-fashion-mnist, or name the folder."
        )
    with gzip.open(path) as file:
        return torch.frombuffer(bytearray(file.read()[header:]), dtype=torch.uint8)
