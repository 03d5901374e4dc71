"""Tensors in the safetensors format: written in one pass, read as views of the mapped file.

The format is eight bytes with the length of a header, the header (JSON: dtype, shape and place of
each tensor), and the tensors' bytes. The format allows no gaps, so that small tensors of their own
fill up every tensor to a multiple of 64 bytes: a matrix product of torch may differ in the last bit
when its operands are aligned otherwise, and a loaded model has to give the bits of the saved one.

Large tensors of nothing but zeros, as caches begin, are named in the header's metadata and take no
bytes.

The safetensors library reads what is written here, but for those. It is not
used itself, because it wants all tensors as bytes in memory to write them, and cannot read them in
place from inside of another file.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.artifact import jsonfile
from fpcompiler.artifact.container import ALIGNMENT, Buffer
from fpcompiler.artifact.damage import DamagedFileError
from fpcompiler.errors import ArtifactError

HEADER_LIMIT: Final = 64 << 20
"""Most bytes of a header; a model with 100,000 tensors needs about 10 MB."""

_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "C64": torch.complex64,
    }
)
_NAMES: Final = MappingProxyType({dtype: name for name, dtype in _DTYPES.items()})
_MAX_DIMENSIONS: Final = 16
_PADDING: Final = "__padding__."
_METADATA: Final = "__metadata__"
_ZEROS: Final = "zeros"
_LARGE: Final = 1 << 20
"""Bytes from which on a tensor of zeros is left out."""

_MOST_ZEROS: Final = 1 << 42
"""Bytes that those of a file may take in memory, together."""


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[Buffer]:
    """Yield the bytes of a safetensors file, one tensor at a time.

    Raises:
        ArtifactError: If a tensor's dtype cannot be stored.
    """
    header: dict[str, Any] = {}
    position = 0
    zeros: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            raise ArtifactError(
                f"tensor {name!r}: {tensor.dtype} {tensor.layout} cannot be stored."
            )
        if is_zeros(tensor):
            zeros[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
            continue
        header[name] = _entry(_NAMES[tensor.dtype], tensor.shape, position, tensor.nbytes)
        position += tensor.nbytes
        gap = -position % ALIGNMENT
        if gap:
            header[f"{_PADDING}{len(header)}"] = _entry("U8", (gap,), position, gap)
        position += gap
    if zeros:  # of which the format wants to be text
        header[_METADATA] = {_ZEROS: jsonfile.dump(zeros).decode()}
    text = jsonfile.dump(header)
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name, tensor in tensors.items():
        if name not in zeros:
            yield _bytes(tensor)
            yield bytes(-tensor.nbytes % ALIGNMENT)


def is_zeros(tensor: Tensor) -> bool:
    """Return whether a tensor is large, and every byte of it is zero."""
    if tensor.nbytes < _LARGE:
        return False
    row = tensor.detach()
    while row.ndim > 1:
        row = row[0]
    # One row tells of most tensors that they are none, and needs no copy of the others.
    return _is_zero(row) and _is_zero(tensor.detach())


def _is_zero(tensor: Tensor) -> bool:
    return not bool(tensor.contiguous().reshape(-1).view(torch.uint8).any())


def _entry(dtype: str, shape: Sequence[int], begin: int, size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}


def _bytes(tensor: Tensor) -> Buffer:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


@dataclass(frozen=True)
class _Place:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def views(buffer: mmap.mmap, offset: int, size: int, what: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file as views of a mapping.

    Args:
        buffer: The mapping; private to the process, so that writing to a view could not change
            the file.
        offset: Where the safetensors file starts in it.
        size: Its bytes.
        what: Its name, for errors.

    Raises:
        DamagedFileError: If the header is too long or malformed, or a tensor is not within the
            file, overlaps another one, or has a size that does not fit its shape.
    """
    with memoryview(buffer) as view:
        length = int.from_bytes(view[offset : offset + 8], "little") if size >= 8 else -1
        if not 0 <= length <= size - 8:
            raise DamagedFileError(
                f"{what} is cut off: its header does not fit into its {size} bytes."
            )
        if length > HEADER_LIMIT:
            raise DamagedFileError(
                f"{what} claims a header of {length} bytes; that is no artifact."
            )
        header = jsonfile.parse(view[offset + 8 : offset + 8 + length], what, HEADER_LIMIT)
    start = offset + 8 + length
    zeros = _zeros(header.pop(_METADATA, None), what)
    places = [_place(name, entry, what) for name, entry in header.items()]
    _check_places(places, size - 8 - length, what)
    kept = (place for place in places if not place.name.startswith(_PADDING))
    found = {place.name: _view(buffer, start, place) for place in kept}
    if both := {*found} & {*zeros}:
        raise DamagedFileError(f"{what}, tensor {min(both)[:80]!r}: it is there twice.")
    return {**found, **zeros}


def _zeros(metadata: Any, what: str) -> dict[str, Tensor]:
    """Return the tensors of zeros that a header's metadata names."""
    if metadata is None:
        return {}
    text = metadata.get(_ZEROS) if isinstance(metadata, dict) and len(metadata) == 1 else None
    if not isinstance(text, str):
        raise DamagedFileError(f"{what}: its header has metadata that no artifact has.")
    where, total = f"the zeros of {what}", 0
    found = {}
    for name, entry in jsonfile.parse(text.encode(), where, HEADER_LIMIT).items():
        tensor = f"{where}, tensor {name[:80]!r}"
        if not isinstance(entry, dict) or {*entry} != {"dtype", "shape"}:
            raise DamagedFileError(f"{tensor}: it needs a dtype and a shape.")
        if name.startswith(_PADDING):
            raise DamagedFileError(f"{tensor}: padding is no zeros.")
        dtype, shape = _type_and_shape(entry, tensor)
        total += math.prod(shape) * dtype.itemsize
        if total > _MOST_ZEROS or _too_large(shape):
            raise DamagedFileError(f"{where} would take {total} bytes; that is no artifact.")
        try:
            # Memory that nobody writes to is the system's one page of zeros.
            found[name] = torch.zeros(shape, dtype=dtype)
        except RuntimeError as error:
            raise DamagedFileError(
                f"{tensor}: there is no memory for {dtype} {list(shape)}. Use a machine with more."
            ) from error
    return found


def _place(name: str, entry: Any, what: str) -> _Place:
    where = f"{what}, tensor {name[:80]!r}"
    if not isinstance(entry, dict) or {*entry} != {"dtype", "shape", "data_offsets"}:
        raise DamagedFileError(f"{where}: its header should have dtype, shape and data_offsets.")
    dtype, shape = _type_and_shape(entry, where)
    offsets = _sizes(entry["data_offsets"], f"{where}: data_offsets")
    if len(offsets) != 2:
        raise DamagedFileError(f"{where}: data_offsets have too many entries.")
    begin, end = offsets
    if _too_large(shape) or math.prod(shape) * dtype.itemsize != end - begin:
        raise DamagedFileError(
            f"{where}: {end - begin} bytes do not hold {entry['dtype']} {list(shape)}."
        )
    if begin % dtype.itemsize:
        raise DamagedFileError(f"{where}: it is not aligned to its dtype.")
    return _Place(name, dtype, shape, begin, end)


def _type_and_shape(entry: Mapping[str, Any], where: str) -> tuple[torch.dtype, tuple[int, ...]]:
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise DamagedFileError(f"{where}: unknown dtype {str(entry['dtype'])[:40]!r}.")
    shape = _sizes(entry["shape"], f"{where}: shape")
    if len(shape) > _MAX_DIMENSIONS:
        raise DamagedFileError(f"{where}: shape has too many entries.")
    return dtype, shape


def _too_large(shape: Sequence[int]) -> bool:
    """Whether torch could not count the elements, also where one size is 0."""
    return math.prod(n for n in shape if n) >= 2**62


def _sizes(value: Any, where: str) -> tuple[int, ...]:
    good = isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)
    if not good:
        raise DamagedFileError(f"{where} is not a list of sizes.")
    return tuple(value)


def _check_places(places: list[_Place], size: int, what: str) -> None:
    """Check that the tensors cover the data one after the other, without gap or overlap."""
    position = 0
    for place in sorted(places, key=lambda place: (place.begin, place.end)):
        if place.begin != position:
            raise DamagedFileError(
                f"{what}, tensor {place.name[:80]!r}: it overlaps another one, or leaves a gap."
            )
        position = place.end
    if position != size:
        raise DamagedFileError(f"{what}: its tensors take {position} bytes, but it holds {size}.")


def _view(buffer: mmap.mmap, start: int, place: _Place) -> Tensor:
    count = math.prod(place.shape)
    if not count:
        return torch.empty(place.shape, dtype=place.dtype)
    flat = torch.frombuffer(buffer, dtype=place.dtype, count=count, offset=start + place.begin)
    return flat.view(place.shape)
