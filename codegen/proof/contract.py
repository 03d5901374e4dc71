"""Level 2, the judge: what the tensor maps and the launch of an instance must be.

Everything here follows from the formats, the sizes, the packed layout
(:mod:`fpcompiler.numerics.kernel_layout`) and the tile; nothing is taken from CUTLASS, whose code
made the maps that are judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from fpcompiler.codegen.cutlass.instance import Instance
from fpcompiler.codegen.problem import BlockScale, OutputType
from fpcompiler.codegen.proof.launch import LaunchRecord, LaunchShape, MapType, Swizzle, TensorMap
from fpcompiler.formats import FORMATS

__all__ = ["check_launch", "launch_controls", "SHARED_MEMORY"]

SHARED_MEMORY: Final = MappingProxyType({90: 227 << 10, 100: 227 << 10, 120: 99 << 10})
"""Bytes that a thread block may have, by CUTLASS's architecture (CUDA C++ Programming Guide)."""

_SPAN: Final = 128  # bytes of shared memory within which chunks can change place
_ATOM_ROWS: Final = 128
_ATOM_SCALES: Final = 4
_ATOM_BYTES: Final = _ATOM_ROWS * _ATOM_SCALES
_CODES: Final = {4: MapType.U4_PACKED, 6: MapType.U6_UNPACKED, 8: MapType.UINT8}
"""How codes of so many bits lie in shared memory before they are stored, packed."""
_DEFAULT_SHARED_MEMORY: Final = 48 << 10  # more than that must be asked for
_PORTABLE_CLUSTER: Final = 8


@dataclass(frozen=True)
class _Axes:
    """What a tensor map says of memory: its elements, its axes, and what one copy moves.

    Attributes:
        type: The type of elements.
        contiguous: Elements along the contiguous axis, and how many of them a copy moves.
        others: Of each other axis the stride in bytes, the size and what a copy moves; the largest
            stride first, and without that of batches, of which there is one.
        swizzle: How shared memory is permuted.
    """

    type: MapType
    contiguous: tuple[int, int]
    others: tuple[tuple[int, int, int], ...]
    swizzle: Swizzle

    def __str__(self) -> str:
        """Return it in words, for findings."""
        size, copied = self.contiguous
        others = ", ".join(f"{n} x {step} bytes by {box}" for step, n, box in self.others)
        return f"{self.type.name} [{size} by {copied}, {others}] swizzle {self.swizzle.name}"

    @classmethod
    def of(cls, found: TensorMap) -> _Axes:
        """Return the axes of a map."""
        others = list(zip(found.strides, found.sizes[1:], found.box[1:], strict=True))
        # The last one: strides of an axis of one are of no matter.
        if others and others[-1][1:] == (1, 1):
            others.pop()
        return cls(
            found.type, (found.sizes[0], found.box[0]), tuple(sorted(others, reverse=True)),
            found.swizzle,
        )  # fmt: skip


def check_launch(record: LaunchRecord, instance: Instance) -> tuple[str, ...]:
    """Return what a recorded call did otherwise than the instance must; empty if nothing.

    Args:
        record: The call.
        instance: What its kernel was generated from.
    """
    if record.status:
        return (f"the call returned {record.status}",)
    if not record.grid:
        return ("nothing was launched",)
    return (*_check_maps(record, instance), *_check_grid(record, instance))


def launch_controls(
    record: LaunchRecord, instance: Instance
) -> Mapping[str, tuple[LaunchRecord, Instance]]:
    """Return records and instances that do not belong together, by what is wrong.

    :func:`check_launch` must find something in each of them.
    """
    shape, tile = record.shape, instance.tile
    other = BlockScale.MX32 if instance.scale is BlockScale.NV16 else BlockScale.NV16
    a, b = (FORMATS[name].storage_bits for name in (instance.a, instance.b))
    # Only widths show in a map: of formats of one width it takes the machine code to see which.
    swapped = replace(instance, a=instance.b, b=instance.a)
    bytes_ = replace(instance, a="f8E4M3FN", b="f8E4M3FN")
    wrong = {
        "K padded by another 128": (_with(record, k=shape.k + 128), instance),
        "M and N swapped": (_with(record, m=shape.n, n=shape.m), instance),
        "half the tile": (record, replace(instance, tile=replace(tile, n=tile.n // 2))),
        "formats of A and B swapped": (record, swapped) if a != b else None,
        "FP8 operands": (record, bytes_) if min(a, b) < 8 else None,
        "another block scale": (record, replace(instance, scale=other)),
        "another output type": (record, _with_other_output(instance)),
    }
    return MappingProxyType({name: pair for name, pair in wrong.items() if pair is not None})


def _with(record: LaunchRecord, **sizes: int) -> LaunchRecord:
    return replace(record, shape=replace(record.shape, **sizes))


def _with_other_output(instance: Instance) -> Instance:
    if instance.quantized:
        return replace(instance, quantized=None)
    other = OutputType.BF16 if instance.output is OutputType.F32 else OutputType.F32
    return replace(instance, output=other)


def _check_maps(record: LaunchRecord, instance: Instance) -> Iterator[str]:
    expected = _expected(instance, record.shape)
    outputs = {"d", "residual"} if instance.residual else {"d"}
    found: dict[str, TensorMap] = {}
    for one in record.maps:
        if one.tensor in found:
            yield f"{one.tensor} has two different tensor maps"
        found[one.tensor] = one
        yield from _driver_rules(one)
    if differ := set(found) ^ (set(expected) | outputs):
        yield f"tensor maps of {', '.join(sorted(differ))} are missing or one too many"
    for name in sorted(expected.keys() & found.keys()):
        axes = _Axes.of(found[name])
        if axes != expected[name]:
            yield f"{name}: {axes} is not the expected {expected[name]}"
    for name in sorted(outputs & found.keys()):
        yield from _check_output(found[name], instance, record.shape)


def _expected(instance: Instance, shape: LaunchShape) -> dict[str, _Axes]:
    rows_a, rows_b = _rows_of_copy(instance)
    maps = {
        "a": _operand(instance, instance.a, shape.m, shape.k, rows_a),
        "b": _operand(instance, instance.b, shape.n, shape.k, rows_b),
    }
    if instance.scale is not BlockScale.NONE:
        tile, (cluster_m, cluster_n) = instance.tile, instance.tile.cluster
        maps["a_scales"] = _scales(instance, shape.m, shape.k, tile.of_one_sm[0], cluster_n)
        maps["b_scales"] = _scales(instance, shape.n, shape.k, tile.n, cluster_m)
    return maps


def _rows_of_copy(instance: Instance) -> tuple[int, int]:
    """Return how many rows of A and of B one SM reads; those of a cluster share the rest."""
    tile = instance.tile
    return tile.of_one_sm[0] // tile.cluster[1], tile.n // tile.cluster[0]


def _operand(instance: Instance, element: str, rows: int, k: int, copied: int) -> _Axes:
    bits = FORMATS[element].storage_bits
    kind = _operand_type(instance, bits)
    wide = min(instance.tile.k, _SPAN * 8 // kind.shared_bits)
    swizzle = next(s for s in Swizzle if s.span == wide * kind.shared_bits // 8)
    return _Axes(kind, (k, wide), ((k * bits // 8, rows, copied),), swizzle)


def _operand_type(instance: Instance, bits: int) -> MapType:
    if bits == 8:
        return MapType.UINT8
    if instance.kind in ("mxf4", "nvf4"):
        return MapType.U4_PACKED
    # Instructions that take several widths read bytes: each code is moved into one.
    return MapType.U4_UNPACKED if bits == 4 else MapType.U6_UNPACKED


def _scales(instance: Instance, rows: int, k: int, tile_rows: int, sharing: int) -> _Axes:
    """Return the axes of block scales: atoms of 512 bytes, along K first.

    Atoms that all SMs of a cluster need are shared out between them: along K where there are
    several, else along the rows; of a single one each SM reads a part.
    """
    k_of_atom = instance.scale.block * _ATOM_SCALES
    along_rows, along_k = -(-rows // _ATOM_ROWS), -(-k // k_of_atom)
    copied = [_ATOM_BYTES // 2, -(-tile_rows // _ATOM_ROWS), -(-instance.tile.k // k_of_atom)]
    shared = next(i for i in (2, 1, 0) if copied[i] % sharing == 0)
    copied[shared] //= sharing
    others = (
        (along_k * _ATOM_BYTES, along_rows, copied[1]),
        (_ATOM_BYTES, along_k, copied[2]),
    )
    contiguous = (_ATOM_BYTES // 2, copied[0])
    return _Axes(MapType.UINT16, contiguous, tuple(sorted(others, reverse=True)), Swizzle.NONE)


def _check_output(found: TensorMap, instance: Instance, shape: LaunchShape) -> Iterator[str]:
    """Check D or the residual; how much of the tile the epilogue moves at a time is its choice."""
    kinds = {
        OutputType.BF16: MapType.BFLOAT16,
        OutputType.F16: MapType.FLOAT16,
        OutputType.F32: MapType.FLOAT32,
    }
    axes, bits, kind = _Axes.of(found), instance.output.bytes * 8, kinds[instance.output]
    rows, columns, _ = instance.tile.of_one_sm
    if instance.quantized:
        bits = instance.quantized.bits
        kind = _CODES[bits]
    wanted = (kind, shape.n, ((shape.n * bits // 8, shape.m),))
    memory = (axes.type, axes.contiguous[0], tuple(axis[:2] for axis in axes.others))
    if memory != wanted:
        yield f"{found.tensor}: {memory} is not the expected {wanted}"
    if rows % found.box[1] or columns % found.box[0]:
        yield f"{found.tensor}: copies of {found.box} do not fill a tile of {columns} x {rows}"


def _check_grid(record: LaunchRecord, instance: Instance) -> Iterator[str]:
    tile, shape = instance.tile, record.shape
    rows, columns, _ = tile.of_one_sm
    tiles = [-(-size // step) for size, step in ((shape.m, rows), (shape.n, columns))]
    # Clusters come whole, also where the last one has nothing to do.
    blocks = [-(-n // per) * per for n, per in zip(tiles, tile.cluster, strict=True)]
    found = (*record.grid, record.cluster)
    cluster = (*tile.cluster, 1)
    if instance.machine.collectives > 90:
        # The hardware hands out tiles, one for each block of the grid (cluster launch control).
        if found != (*blocks, 1, cluster):
            yield f"grid and cluster {found} are not the expected {(*blocks, 1, cluster)}"
    else:  # blocks stay and take turns, so that there are at most as many as SMs
        per_cluster = tile.cluster[0] * tile.cluster[1]
        resident = shape.sms // per_cluster * per_cluster
        count, wanted = record.grid[0] * record.grid[1], min(blocks[0] * blocks[1], resident)
        if (count, record.grid[2], record.cluster) != (wanted, 1, cluster):
            yield f"grid and cluster {found} are not {wanted} blocks in clusters of {cluster}"
    yield from _check_resources(record, instance)


def _check_resources(record: LaunchRecord, instance: Instance) -> Iterator[str]:
    threads = record.block[0] * record.block[1] * record.block[2]
    if not 0 < threads <= 1024 or threads % 32:
        yield f"a block of {threads} threads"
    limit = SHARED_MEMORY[instance.machine.collectives]
    if record.shared_memory > limit:
        yield f"{record.shared_memory} bytes of shared memory, of {limit}"
    allowed = dict(record.attributes).get("max_dynamic_shared_memory", _DEFAULT_SHARED_MEMORY)
    if record.shared_memory > allowed:
        yield f"{record.shared_memory} bytes of shared memory, {allowed} asked for"
    size = record.cluster[0] * record.cluster[1] * record.cluster[2]
    if size > _PORTABLE_CLUSTER:
        yield f"clusters of {size}, of which not every GPU has any"


def _driver_rules(found: TensorMap) -> Iterator[str]:
    """Check what the driver requires (CUDA driver API, ``cuTensorMapEncodeTiled``)."""
    kind, name = found.type, found.tensor
    aligned = 32 if kind.unpacks else 16
    inner = found.box[0] * kind.shared_bits // 8
    rules = {
        f"starts at a multiple of {aligned} bytes": found.offset % aligned == 0,
        "has one to five axes": 1 <= len(found.sizes) <= 5,
        "has sizes up to 2**32": all(0 < size <= 1 << 32 for size in found.sizes),
        f"has strides in multiples of {aligned} bytes": all(
            stride % aligned == 0 and stride < 1 << 40 for stride in found.strides
        ),
        "moves at most 256 along an axis": all(0 < size <= 256 for size in found.box),
        "moves multiples of 16 bytes": found.box[0] * kind.bits % 128 == 0,
        "moves no more than the swizzle's span": not found.swizzle or inner <= found.swizzle.span,
        "is not strided": set(found.steps) == {1} and found.interleave == 0,
    }
    if kind.unpacks:
        rules["has K in multiples of 128"] = found.sizes[0] % 128 == 0
        rules["moves 128 along K"] = found.box[0] == 128
        rules["is swizzled by 128 bytes or not"] = found.swizzle in (Swizzle.NONE, Swizzle.B128)
    return (f"{name}: the driver wants that it {rule}" for rule, kept in rules.items() if not kept)
