"""Levels 0, 1 and 5 for one kernel: formats, packed bytes and expected results."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fpcompiler.codegen.cutlass.instance import Instance
from fpcompiler.codegen.cutlass.library import GemmLibrary
from fpcompiler.codegen.legalize import legalize
from fpcompiler.codegen.problem import BlockScale, Rows
from fpcompiler.codegen.proof.formats import prove_formats
from fpcompiler.codegen.proof.golden import GOLDEN, GoldenProblem, fingerprint, recorded
from fpcompiler.codegen.proof.host_reference import HostReference, host_reference
from fpcompiler.codegen.proof.packing import PROBLEMS, prove_packing
from fpcompiler.codegen.proof.record import Check
from fpcompiler.errors import DependencyError
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics import decode, pack
from fpcompiler.numerics.kernel_layout import scale_bytes, swizzle_scales
from fpcompiler.operand import Operand
from fpcompiler.options import Options

__all__ = ["check_formats", "check_packing", "check_golden"]

_HOPPER: Final = "Hopper's kernels hold FP4 and FP6 as E4M3; this level is of Blackwell's layouts"
_SCALE_ROWS: Final = (1, 300)
_SCALE_K: Final = 640


def check_formats(instance: Instance, options: Options) -> tuple[Check, ...]:
    """Return level 0: CUTLASS decodes and rounds the formats of an instance as we do."""
    names = dict.fromkeys((instance.a, instance.b, *_scale_formats(instance)))
    try:
        reference = host_reference(options)
    except DependencyError as error:
        return (Check.skipped("L0", "formats", str(error)),)
    return tuple(_check_format(reference, FORMATS[name]) for name in names)


def check_packing(instance: Instance, library: GemmLibrary, options: Options) -> tuple[Check, ...]:
    """Return level 1: packed bytes mean to CUTLASS, and scales lie where the kernel looks."""
    scales = _check_scales(instance, library)
    name = "packed operands"
    problems = [p for p in PROBLEMS if _is_of(p.weight, p.activation, instance)]
    if instance.machine.collectives == 90:
        return (Check.skipped("L1", name, _HOPPER), *scales)
    if not problems:
        reason = "no pair of operands that is packed for Blackwell has these formats"
        return (Check.skipped("L1", name, reason), *scales)
    try:
        proof = prove_packing(host_reference(options), problems)
    except DependencyError as error:
        return (Check.skipped("L1", name, str(error)), *scales)
    findings = [
        f"{case.problem.m}x{case.problem.n}x{case.problem.k}: {case.error:.3g} of the bound"
        for case in proof.cases
        if not case.error <= 1
    ]
    findings += [f"it holds {c.held}" for c in proof.cases if c.held != instance.b]
    findings += [f"scales of {shape} lie elsewhere" for shape in proof.scales_elsewhere]
    controls = {
        f"{case.problem.m}x{case.problem.n}x{case.problem.k}: {mistake.value}": error > 1
        for case in proof.cases
        for mistake, error in case.controls.items()
    }
    detail = f"{len(proof.cases)} products of packed bytes with CUTLASS {proof.cutlass}"
    return (Check.of("L1", name, detail, findings, controls), *scales)


def check_golden(instance: Instance) -> tuple[Check, ...]:
    """Return level 5: the results that a GPU must give are known, and computed again."""
    name = "expected results"
    if instance.machine.collectives == 90:
        return (Check.skipped("L5", name, "results are recorded for Blackwell only"),)
    problems = [p for p in GOLDEN if _is_of(p.weight, p.activation, instance)]
    if not problems:
        return (Check.skipped("L5", name, "none are recorded for these formats"),)
    table = recorded()
    findings = [f"{p.name} gives other bits" for p in problems if fingerprint(p) != table[p.name]]
    controls = {f"{p.m}x{p.n}x{p.k}: one number wrong": _notices(p) for p in problems}
    detail = f"{len(problems)} problems give the bits on record"
    return (Check.of("L5", name, detail, findings, controls),)


def _check_format(reference: HostReference, spec: FloatSpec) -> Check:
    (proof,) = prove_formats(reference, (spec.name,))
    findings = []
    if proof.decoded_otherwise:
        findings.append(f"{proof.decoded_otherwise} codes are decoded otherwise")
    if proof.encoded_otherwise:
        findings.append(f"{proof.encoded_otherwise} values are encoded otherwise")
    codes = torch.arange(spec.code_count, dtype=torch.uint8)
    theirs = reference.decode(pack(codes, spec.storage_bits), spec, len(codes))
    other = _another_of_that_width(spec)
    noticed = not torch.equal(theirs.nan_to_num(), decode(codes, other).nan_to_num())
    detail = f"all {proof.codes} codes, {proof.values} values rounded {proof.rounding}"
    return Check.of("L0", spec.name, detail, findings, {f"as {other.short}": noticed})


def _check_scales(instance: Instance, library: GemmLibrary) -> tuple[Check, ...]:
    """Ask the kernel itself where it reads the scale of each block."""
    block = instance.scale.block
    if not block:
        return ()
    findings, noticed = [], {}
    blocks = _SCALE_K // block
    for rows in _SCALE_ROWS:
        shape = (rows, rows, _SCALE_K)
        found = {
            side: torch.tensor([[ask(*shape, r, c * block) for c in range(blocks)]
                                for r in range(rows)])
            for side, ask in (("A", library.scale_index_a), ("B", library.scale_index_b))
        }  # fmt: skip
        numbers = torch.arange(rows * blocks).view(rows, blocks)
        places = _places(numbers)
        findings += [
            f"scales of {side} with {rows} rows lie elsewhere"
            for side, index in found.items()
            if not torch.equal(index, places)
        ]
        if library.scale_bytes(*shape) != (scale_bytes(rows, blocks),) * 2:
            findings.append(f"{rows} rows take other than {scale_bytes(rows, blocks)} bytes")
        noticed[f"{rows} rows: row by row"] = not torch.equal(found["B"], numbers)
    detail = f"the kernel's own index of {_SCALE_ROWS} rows of {blocks} scales"
    return (Check.of("L1", "scales", detail, findings, noticed),)


def _places(numbers: Tensor) -> Tensor:
    """Return in which byte of the tiles each scale is, int64 ``[R, C]``."""
    # A number takes more than a byte: each byte of it goes the same way. 0 fills up, so count on.
    low, high = (swizzle_scales((numbers + 1 >> shift & 255).to(torch.uint8)) for shift in (0, 8))
    held = low.long() + (high.long() << 8)
    places = torch.zeros(numbers.numel() + 1, dtype=torch.int64)
    places[held] = torch.arange(len(held))
    return places[numbers + 1]


def _notices(problem: GoldenProblem) -> bool:
    right = problem.expected()
    wrong = right.clone()
    wrong[0, 0] = wrong[0, 0] * 1.01 + right.abs().max()
    return problem.judge(right).as_modelled and not problem.judge(wrong).passed


def _is_of(weight: Operand, activation: Operand, instance: Instance) -> bool:
    """Return whether an instance computes products of two operands."""
    kind = instance.machine.facts.kind_for(weight, activation)
    if kind is None or kind.name != instance.kind:
        return False
    problem = legalize("", weight, activation, (8, 128), instance.arch, rows=Rows.DECODE)
    found = (
        problem.kind,
        problem.activation.format.name,
        problem.weight.format.name,
        problem.scale,
    )
    return found == (instance.kind, instance.a, instance.b, instance.scale)


def _scale_formats(instance: Instance) -> tuple[str, ...]:
    return {
        BlockScale.NONE: (),
        BlockScale.MX32: ("f8E8M0FNU",),
        BlockScale.NV16: ("f8E4M3FNU",),  # scales have no sign
    }[instance.scale]


def _another_of_that_width(spec: FloatSpec) -> FloatSpec:
    """Return a format in which the same codes are other numbers."""
    return next(
        other
        for other in FORMATS.values()
        if other.storage_bits == spec.storage_bits
        and other.code_count >= spec.code_count
        and other.values[1] != spec.values[1]
    )
