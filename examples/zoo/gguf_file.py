"""Reads GGUF, the file format of llama.cpp: a header of named values, then tensors.

Written out because the package ``gguf`` takes ten seconds for a vocabulary of 49,152 words. Layout:
``docs/gguf.md`` in github.com/ggml-org/ggml.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpcompiler.errors import ArtifactError

# struct codes of the types that are one number
_SCALARS = dict(enumerate("BbHhIif?")) | dict(enumerate("Qqd", start=10))
_STRING, _ARRAY = 8, 9
_BLOCK = 32


@dataclass(frozen=True)
class GgufFile:
    """The content of a file.

    Attributes:
        fields: The named values of the header.
        tensors: The tensors by name, in fp32.
    """

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def read_fields(path: Path) -> dict[str, Any]:
    """Return the named values of the header.

    Raises:
        ArtifactError: If the file is not GGUF version 2 or 3.
    """
    return _Reader(path.read_bytes()).header()[0]


def read(path: Path) -> GgufFile:
    """Return the named values and all tensors, dequantized.

    Raises:
        ArtifactError: If the file is not GGUF version 2 or 3, or has a tensor of another type than
            F32, Q4_1 and Q8_0.
    """
    reader = _Reader(path.read_bytes())
    fields, count = reader.header()
    places = [reader.tensor() for _ in range(count)]
    alignment = fields.get("general.alignment", 32)
    start = -(-reader.position // alignment) * alignment
    tensors = {
        name: _values(reader.data, kind, math.prod(shape), start + offset).reshape(shape)
        for name, shape, kind, offset in places
    }
    return GgufFile(fields, tensors)


class _Reader:
    """Reads one value after the other."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        start, self.position = self.position, self.position + size
        return self.data[start : start + size].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, size = self.scalar("I"), self.scalar("Q")
        return [self.value(kind) for _ in range(size)]

    def header(self) -> tuple[dict[str, Any], int]:
        """Return the named values and how many tensors follow."""
        if self.data[:4] != b"GGUF" or self.data[4:8] not in (b"\2\0\0\0", b"\3\0\0\0"):
            raise ArtifactError("this is not a GGUF file of version 2 or 3.")
        self.position = 8
        tensors, count = self.scalar("Q"), self.scalar("Q")
        fields = {}
        for _ in range(count):
            name = self.string()
            fields[name] = self.value(self.scalar("I"))
        return fields, tensors

    def tensor(self) -> tuple[str, list[int], int, int]:
        """Return the name, shape, type and offset of a tensor; the file has the last axis first."""
        name = self.string()
        shape = [self.scalar("Q") for _ in range(self.scalar("I"))]
        return name, shape[::-1], self.scalar("I"), self.scalar("Q")


def _values(data: bytes, kind: int, count: int, offset: int) -> Tensor:
    if kind not in _DEQUANTIZE:
        raise ArtifactError(f"a tensor has the GGUF type {kind}; known: {sorted(_DEQUANTIZE)}.")
    dtype, convert = _DEQUANTIZE[kind]
    per_record = 1 if dtype.fields is None else _BLOCK
    records = np.frombuffer(data, dtype, count // per_record, offset)
    return torch.from_numpy(convert(records))


def _f32(records: np.ndarray) -> np.ndarray:
    return records.copy()


def _q4_1(records: np.ndarray) -> np.ndarray:
    """16 steps from the least value of 32; the low nibbles are the first 16."""
    codes = np.concatenate([records["codes"] & 15, records["codes"] >> 4], axis=1)
    scale, least = (records[key].astype(np.float32)[:, None] for key in ("scale", "least"))
    return codes * scale + least


def _q8_0(records: np.ndarray) -> np.ndarray:
    """32 signed integers with one scale."""
    return records["codes"] * records["scale"].astype(np.float32)[:, None]


_DEQUANTIZE = {
    0: (np.dtype("<f4"), _f32),
    3: (np.dtype([("scale", "<f2"), ("least", "<f2"), ("codes", "u1", 16)]), _q4_1),
    8: (np.dtype([("scale", "<f2"), ("codes", "i1", 32)]), _q8_0),
}
