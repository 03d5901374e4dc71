"""All levels of proof for one compiled kernel, each check with controls that must be noticed."""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import Final

from fpcompiler.codegen.cutlass.library import GemmLibrary
from fpcompiler.codegen.cutlass.record import parse_instance
from fpcompiler.codegen.kernel import BuiltKernel
from fpcompiler.codegen.proof.binary_levels import check_code, check_launches
from fpcompiler.codegen.proof.disassembly import MachineCode
from fpcompiler.codegen.proof.launch import LaunchRecord
from fpcompiler.codegen.proof.number_levels import check_formats, check_golden, check_packing
from fpcompiler.codegen.proof.record import Check, ProofRecord
from fpcompiler.codegen.proof.second_compiler import check_second_compiler
from fpcompiler.errors import OptionError
from fpcompiler.options import Options

__all__ = ["LEVELS", "prove", "require_levels"]

LEVELS: Final = MappingProxyType(
    {
        "L0": "codes mean what CUTLASS says, and are rounded to alike",
        "L1": "packed bytes and scales lie where CUTLASS and the kernel look",
        "L2": "the library asks the GPU for the right tensors and the right launch",
        "L3": "the machine code multiplies the right formats and spills nothing",
        "L5": "the results that a GPU must give are on record",
        "L6": "a second compiler, CuTe DSL, asks for the same product and the same tensors",
    }
)
"""What each level shows. L4 and L7 are runs on a GPU."""


def prove(
    built: BuiltKernel, levels: Collection[str] = tuple(LEVELS), options: Options | None = None
) -> ProofRecord:
    """Check a compiled kernel without the GPU that it is for.

    Args:
        built: The kernel; level 2 needs its object file too.
        levels: Names in :data:`LEVELS`.
        options: Settings; by default those of the environment.

    Returns:
        The record. What cannot be checked for want of a tool is skipped, with the reason.

    Raises:
        OptionError: If there is no such level.
        ArtifactError: If the kernel's metadata describe no instance of this version.
        TargetError: If the library is none of ours.
    """
    require_levels(levels)
    options = options or Options.from_env()
    instance = parse_instance(built.metadata["description"])
    checks: list[Check] = []
    launches: tuple[LaunchRecord, ...] = ()
    code: MachineCode | None = None
    if "L0" in levels:
        checks += check_formats(instance, options)
    if "L1" in levels:
        checks += check_packing(instance, GemmLibrary(built.path), options)
    if "L2" in levels:
        launches, found = check_launches(built, instance, options)
        checks += found
    if "L3" in levels:
        code, found = check_code(built, instance, options)
        checks += found
    if "L5" in levels:
        checks += check_golden(instance)
    if "L6" in levels:
        checks += check_second_compiler(built, instance, options)
    metadata = built.metadata
    return ProofRecord(
        instance.name, instance.arch, metadata["description"], metadata["sha256"],
        metadata["toolchain"], tuple(checks), launches, code,
    )  # fmt: skip


def require_levels(levels: Collection[str]) -> None:
    """Check that all levels exist.

    Raises:
        OptionError: If one does not.
    """
    if unknown := sorted(set(levels) - set(LEVELS)):
        raise OptionError(f"there is no level {unknown[0]}; levels: {', '.join(LEVELS)}.")
