"""Level 6: CuTe DSL, given the same problem, asks for the same product and the same tensors.

The instruction descriptors are compared bit by bit where both are known, and the tensor maps of A,
B and their scales field by field. What differs by design is not compared: how many blocks are
launched, and the epilogue.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from fpcompiler.codegen.cutlass.instance import Instance
from fpcompiler.codegen.dsl.aot import DslKernel, build, why_not
from fpcompiler.codegen.kernel import BuiltKernel
from fpcompiler.codegen.proof.descriptor import MmaDescriptor, mma_descriptors
from fpcompiler.codegen.proof.disassembly import find_disassembler
from fpcompiler.codegen.proof.host_reference import cuda_headers
from fpcompiler.codegen.proof.launch import (
    LaunchShape,
    MapType,
    Swizzle,
    TensorMap,
    record_launch,
    why_no_recorder,
)
from fpcompiler.codegen.proof.record import Check
from fpcompiler.errors import DependencyError, TargetError
from fpcompiler.options import Options

__all__ = ["check_second_compiler", "decode_map", "compare_descriptors", "compare_maps", "SHAPE"]

SHAPE: Final = LaunchShape(300, 520, 640)
"""What tensor maps are compared for."""

_RECORDER: Final = Path(__file__).with_name("dsl_recorder.cpp")
_COMPARED: Final = ("a", "b", "a_scales", "b_scales")
_TENSORS: Final = (*_COMPARED, "d")
_TYPES: Final = {
    0: MapType.UINT8, 1: MapType.UINT16, 10: MapType.BFLOAT16, 11: MapType.U4_PACKED,
    12: MapType.U4_UNPACKED, 13: MapType.U6_UNPACKED,
}  # fmt: skip
"""Element types by their number in a tensor map, which is another one than the driver's."""

_MUST_BE_KNOWN: Final = 0x1FFF9F80
"""Bits of an instruction descriptor: formats, layouts, N, format of scales, and M."""


def check_second_compiler(
    built: BuiltKernel, instance: Instance, options: Options
) -> tuple[Check, ...]:
    """Return level 6: both compilers agree on the product and on the tensors."""
    names = ("descriptors of CuTe DSL", "tensor maps of CuTe DSL")
    if reason := why_not(instance) or why_no_recorder(built):
        return tuple(Check.skipped("L6", name, reason) for name in names)
    try:
        ours = mma_descriptors(find_disassembler(options).ptx(built.path))
        maps = record_launch(built, SHAPE, options).maps
        with tempfile.TemporaryDirectory() as folder:
            kernel = build(instance, Path(folder))
            theirs = _record(kernel, Path(folder), SHAPE)
    except DependencyError as error:
        return tuple(Check.skipped("L6", name, str(error)) for name in names)
    except TargetError as error:
        return tuple(Check.of("L6", name, "", (str(error),)) for name in names)
    return _check_descriptors(kernel, ours, built), _check_maps(theirs, maps)


def compare_descriptors(
    ours: tuple[MmaDescriptor, ...], theirs: tuple[MmaDescriptor, ...]
) -> tuple[str, ...]:
    """Return in what instruction descriptors differ; empty if in nothing that is known of both."""
    if not ours or not theirs:
        return ("one of the two has no tcgen05.mma",)
    return tuple(dict.fromkeys(line for y in theirs for line in _differences(ours[0], y)))


def compare_maps(ours: tuple[TensorMap, ...], theirs: tuple[TensorMap, ...]) -> tuple[str, ...]:
    """Return in what the tensor maps of operands and scales differ."""
    pairs = [
        {one.tensor: one for one in maps if one.tensor in _COMPARED} for maps in (ours, theirs)
    ]
    names = sorted(pairs[0].keys() | pairs[1].keys())
    return tuple(
        f"{name}: {first} is not {second}"
        for name in names
        if (first := _comparable(pairs[0].get(name))) != (second := _comparable(pairs[1].get(name)))
    )


def decode_map(tensor: str, words: tuple[int, ...]) -> TensorMap:
    """Return what 32 words of a tensor map say.

    Their format is not published. This reading was found by comparing maps with what was asked for;
    a wrong one would show as a difference from the maps of the other compiler.

    Args:
        tensor: Whose map it is.
        words: The words.

    Raises:
        TargetError: If the type is none that GEMMs use.
    """
    rank = (words[2] >> 4 & 7) + 1
    kind = words[2] >> 7 & 15
    if kind not in _TYPES:
        raise TargetError(f"the tensor map of {tensor} has elements of type {kind}")
    box = [words[13] >> 24, *(words[14] >> shift & 255 for shift in (0, 8, 16, 24))]
    return TensorMap(
        tensor=tensor,
        offset=0,
        type=_TYPES[kind],
        sizes=tuple(word + 1 for word in words[8 : 8 + rank]),
        strides=tuple(16 * word for word in words[3 : 2 + rank]),
        box=tuple(size + 1 for size in box[:rank]),
        steps=(1,) * rank,
        interleave=0,
        swizzle=Swizzle(words[2] >> 13 & 7),
    )


def _check_descriptors(
    kernel: DslKernel, ours: tuple[MmaDescriptor, ...], built: BuiltKernel
) -> Check:
    theirs = mma_descriptors(kernel.ptx)
    flipped = tuple(replace(one, bits=one.bits ^ 1 << 7) for one in ours)
    wider = tuple(replace(one, bits=one.bits ^ 1 << 17) for one in ours)
    controls = {
        "another format of A": bool(compare_descriptors(flipped, theirs)),
        "another N": bool(compare_descriptors(wider, theirs)),
    }
    measured = {
        "nvcc_seconds": built.metadata["cost"]["seconds"],
        "dsl_seconds": round(kernel.compile_seconds, 1),
        "dsl_import_seconds": round(kernel.import_seconds, 1),
    }
    detail = "compiled in {dsl_seconds} s of CPU, by nvcc in {nvcc_seconds} s".format(**measured)
    found = compare_descriptors(ours, theirs)
    return Check.of("L6", "descriptors of CuTe DSL", detail, found, controls, measured)


def _check_maps(theirs: tuple[TensorMap, ...], ours: tuple[TensorMap, ...]) -> Check:
    a, *rest = ours
    longer = replace(a, sizes=(a.sizes[0] + 128, *a.sizes[1:]))
    wider = replace(a, type=MapType.UINT8)
    controls = {
        "K padded by another 128": bool(compare_maps((longer, *rest), theirs)),
        "FP8 operands": bool(compare_maps((wider, *rest), theirs)),
    }
    detail = f"A, B and their scales, {SHAPE}"
    return Check.of("L6", "tensor maps of CuTe DSL", detail, compare_maps(ours, theirs), controls)


def _differences(x: MmaDescriptor, y: MmaDescriptor) -> Iterator[str]:
    known = x.known & y.known
    if _MUST_BE_KNOWN & ~known:
        yield f"bits {_MUST_BE_KNOWN & ~known:#x} of a descriptor are not known"
    if differ := (x.bits ^ y.bits) & known:
        yield f"{x.bits & known:#010x} and {y.bits & known:#010x} differ in {differ:#x}"
    if (x.sms, x.block) != (y.sms, y.block):
        yield f"{x.instruction} is not {y.instruction}"


def _comparable(found: TensorMap | None) -> tuple[object, ...] | None:
    """Return what both compilers must agree on.

    Strides of one batch are of no matter. Which atoms of scales an SM reads and which ones it gets
    from its neighbour is a choice; how many it reads is not.
    """
    if found is None:
        return None
    axes = list(zip(found.strides, found.sizes[1:], found.box[1:], strict=True))
    if axes[-1][1:] == (1, 1):
        axes.pop()
    memory = (found.type.name, found.swizzle.name, found.sizes[0])
    if found.tensor.endswith("scales"):
        return (*memory, math.prod(found.box), sorted((axis[:2] for axis in axes), reverse=True))
    return (*memory, found.box[0], sorted(axes, reverse=True))


def _record(kernel: DslKernel, folder: Path, shape: LaunchShape) -> tuple[TensorMap, ...]:
    program = folder / "recorder"
    header = kernel.object.with_suffix(".h").read_text(encoding="utf-8")
    entry = re.search(r"void _mlir_fpc_dsl__mlir_ciface_(\w+)\(", header)
    if entry is None:
        raise TargetError("CuTe DSL's object file has no function to call")
    command = [
        "g++", "-std=c++17", f"-DENTRY=fpc_dsl_{entry[1]}", f"-I{cuda_headers()}",
        str(_RECORDER), str(kernel.object), "-o", str(program),
    ]  # fmt: skip
    sizes = [str(size) for size in (shape.m, shape.n, shape.k)]
    printed = ""
    for line in (command, [str(program), *sizes]):
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise TargetError(f"CuTe DSL's kernel cannot be recorded: {done.stderr[-1000:]}")
        printed = done.stdout
    rows = [tuple(map(int, line.split())) for line in printed.splitlines()]
    return tuple(decode_map(_TENSORS[row[0] - 1], row[1:]) for row in rows)
