"""Levels 2 and 3 for one kernel: what it asks of a GPU, and what machine code it is."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Final

from fpcompiler.codegen.cutlass.instance import Instance
from fpcompiler.codegen.kernel import BuiltKernel
from fpcompiler.codegen.nvcc import find_nvcc
from fpcompiler.codegen.proof.contract import check_launch, launch_controls
from fpcompiler.codegen.proof.descriptor import mma_descriptors
from fpcompiler.codegen.proof.disassembly import MachineCode, find_disassembler
from fpcompiler.codegen.proof.launch import (
    LaunchRecord,
    LaunchShape,
    record_launch,
    why_no_recorder,
)
from fpcompiler.codegen.proof.machine_code import (
    check_descriptors,
    check_machine_code,
    check_resources,
    descriptor_controls,
    machine_code_controls,
    spilled,
)
from fpcompiler.codegen.proof.record import Check
from fpcompiler.errors import DependencyError, TargetError
from fpcompiler.options import Options

__all__ = ["LAUNCH_SHAPES", "check_launches", "check_code"]

LAUNCH_SHAPES: Final = (
    LaunchShape(1, 8, 128), LaunchShape(300, 520, 640), LaunchShape(4096, 11008, 4096),
)  # fmt: skip
"""What launches are recorded for: the least, nothing whole, and more tiles than SMs."""

_QUANTIZED_SHAPES: Final = (
    LaunchShape(1, 128, 128), LaunchShape(300, 640, 640), LaunchShape(4096, 11008, 4096),
)  # fmt: skip
"""The same where outputs are quantized: rows are whole then."""


def check_launches(
    built: BuiltKernel, instance: Instance, options: Options
) -> tuple[tuple[LaunchRecord, ...], tuple[Check, ...]]:
    """Return level 2, with what calls of the kernel ask of a GPU.

    The checks are that tensor maps and launches are those of the instance, and that the library is
    made of the object file which was called.
    """
    if reason := why_no_recorder(built):
        return (), (Check.skipped("L2", "launches", reason),)
    try:
        shapes = _QUANTIZED_SHAPES if instance.quantized else LAUNCH_SHAPES
        records = tuple(record_launch(built, shape, options) for shape in shapes)
    except TargetError as error:
        return (), (Check.of("L2", "launches", "", (str(error),)),)
    checks = (_check_launch(record, instance) for record in records)
    return records, (*checks, _check_object(built, options))


def check_code(
    built: BuiltKernel, instance: Instance, options: Options
) -> tuple[MachineCode | None, tuple[Check, ...]]:
    """Return level 3, with the machine code: instructions, formats that they read, registers."""
    try:
        tool = find_disassembler(options)
        code = tool.machine_code(built.path)
    except DependencyError as error:
        return None, (Check.skipped("L3", "machine code", str(error)),)
    except TargetError as error:
        return None, (Check.of("L3", "machine code", "", (str(error),)),)
    checks = [_check_instructions(code, instance), _check_registers(code)]
    if instance.machine.collectives == 100:
        checks.append(_check_descriptors(tool.ptx(built.path), instance))
    return code, tuple(checks)


def _check_object(built: BuiltKernel, options: Options) -> Check:
    """Link the object file again: the same bytes come out of the same object file only."""
    name = "the library is this object"
    try:
        nvcc = find_nvcc(options)
    except DependencyError as error:
        return Check.skipped("L2", name, str(error))
    if nvcc.toolchain != built.metadata["toolchain"]:
        return Check.skipped("L2", name, f"it was linked by {built.metadata['toolchain']}")
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder)
        shutil.copyfile(built.object, again / "kernel.o")
        linked = nvcc.link(again)
        same = linked is not None and _sha256(again / "kernel.so") == _sha256(built.path)
    findings = () if same else ("linked again, it is another library",)
    return Check.of("L2", name, "linked again, it has the same bytes", findings)


def _check_instructions(code: MachineCode, instance: Instance) -> Check:
    controls = {
        wrong: bool(check_machine_code(code, other))
        for wrong, other in machine_code_controls(instance).items()
    }
    detail = f"{sum(code.opcodes.values())} instructions of {code.arch}"
    return Check.of("L3", "instructions", detail, check_machine_code(code, instance), controls)


def _check_registers(code: MachineCode) -> Check:
    controls = {"a spilled register": bool(check_resources(spilled(code)))}
    detail = f"{code.registers} registers, no stack, no spills"
    return Check.of("L3", "registers", detail, check_resources(code), controls)


def _check_launch(record: LaunchRecord, instance: Instance) -> Check:
    controls = {
        wrong: bool(check_launch(*pair))
        for wrong, pair in launch_controls(record, instance).items()
    }
    detail = f"{len(record.maps)} tensor maps, grid {list(record.grid)}"
    return Check.of(
        "L2", f"launch {record.shape}", detail, check_launch(record, instance), controls
    )


def _check_descriptors(ptx: str, instance: Instance) -> Check:
    found = mma_descriptors(ptx)
    controls = {
        wrong: bool(check_descriptors(found, other))
        for wrong, other in descriptor_controls(instance).items()
    }
    names = ", ".join(sorted({f"{one.bits:#010x} {one.instruction}" for one in found}))
    return Check.of("L3", "descriptor", names, check_descriptors(found, instance), controls)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
