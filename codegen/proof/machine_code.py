"""Level 3: what machine code an instance must have, and what it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from fpcompiler.codegen.cutlass.instance import Instance
from fpcompiler.codegen.problem import BlockScale
from fpcompiler.codegen.proof.descriptor import MMA_FORMATS, MmaDescriptor
from fpcompiler.codegen.proof.disassembly import MachineCode
from fpcompiler.formats import FORMATS

__all__ = [
    "check_machine_code", "check_descriptors", "check_resources", "machine_code_controls",
    "descriptor_controls", "spilled",
]  # fmt: skip

_MULTIPLY: Final = frozenset(
    f"{kind}MMA" for kind in ("UTCO", "UTCQ", "UTCH", "UTCI", "O", "Q", "H", "I", "D", "B")
) | frozenset(f"{kind}GMMA" for kind in "QHIB")
"""Instructions of tensor cores, by the first part of their names."""

_FP4_KINDS: Final = ("mxf4", "nvf4")
_CONVERTS: Final = {
    name: f"F2FP.SATFINITE.{FORMATS[name].short.upper()}.F32"
    for name in ("f4E2M1FN", "f6E2M3FN", "f6E3M2FN", "f8E4M3FN", "f8E5M2")
}
"""Instructions that round to codes of a format, by the beginning of their names."""
_MAX_REGISTERS: Final = 255


def check_machine_code(code: MachineCode, instance: Instance) -> tuple[str, ...]:
    """Return how machine code multiplies and moves otherwise than an instance must."""
    return (*_check_multiply(code, instance), *_check_moves(code, instance))


def check_resources(code: MachineCode) -> tuple[str, ...]:
    """Return what of a function's registers is kept in memory; empty if nothing."""
    found = {name: n for name, n in code.opcodes.items() if name.split(".")[0] in ("LDL", "STL")}
    findings = []
    if code.stack or code.local:
        findings.append(f"{code.stack} bytes of stack, {code.local} of local memory")
    if found:
        findings.append(f"{sum(found.values())} instructions that spill: {', '.join(found)}")
    if not 0 < code.registers <= _MAX_REGISTERS:
        findings.append(f"{code.registers} registers")
    return tuple(findings)


def check_descriptors(found: tuple[MmaDescriptor, ...], instance: Instance) -> tuple[str, ...]:
    """Return what instruction descriptors say otherwise than an instance must."""
    if not found:
        return ("the PTX has no tcgen05.mma",)
    return tuple(dict.fromkeys(line for one in found for line in _check_descriptor(one, instance)))


def machine_code_controls(instance: Instance) -> Mapping[str, Instance]:
    """Return instances that machine code does not belong to, by what is wrong."""
    others = {
        "nvf4": ("f4E2M1FN", "f4E2M1FN", BlockScale.NV16),
        "mxf4": ("f4E2M1FN", "f4E2M1FN", BlockScale.MX32),
        "mxf8f6f4": ("f6E3M2FN", "f4E2M1FN", BlockScale.MX32),
        "f8f6f4": ("f6E3M2FN", "f4E2M1FN", BlockScale.NONE),
        "fp8": ("f8E4M3FN", "f8E4M3FN", BlockScale.NONE),
    }
    kinds = [kind.name for kind in instance.machine.facts.kinds if kind.name in others]
    wrong = {
        f"kind {kind}": replace(instance, kind=kind, a=a, b=b, scale=scale)
        for kind, (a, b, scale) in others.items()
        if kind in kinds and kind != instance.kind
    }
    tile = instance.tile
    if instance.machine.collectives == 100:
        wrong["the other number of SMs"] = replace(instance, tile=replace(tile, sms=3 - tile.sms))
    if instance.quantized:
        for name in (name for name in _CONVERTS if name != instance.quantized.element):
            operand = f"{name}@block32:f8E8M0FNU"
            other = replace(instance.quantized, operand=operand)
            wrong[f"results as {FORMATS[name].short}"] = replace(instance, quantized=other)
        wrong["results that are not quantized"] = replace(instance, quantized=None)
    if instance.machine.collectives == 90:
        wrong["half the tile"] = replace(instance, tile=replace(tile, n=tile.n // 2))
        wrong["E5M2 operands"] = replace(instance, a="f8E5M2", b="f8E5M2")
    return MappingProxyType(wrong)


def descriptor_controls(instance: Instance) -> Mapping[str, Instance]:
    """Return instances that the descriptors of one do not belong to, by what is wrong."""
    tile = instance.tile
    swapped = replace(instance, a=instance.b, b=instance.a)
    scale = BlockScale.MX32 if instance.scale is BlockScale.NV16 else BlockScale.NV16
    wrong = {
        "another format of A": replace(instance, a=_another(instance.a)),
        "another format of B": replace(instance, b=_another(instance.b)),
        "half of N": replace(instance, tile=replace(tile, n=tile.n // 2)),
        "half of M": replace(instance, tile=replace(tile, m=tile.m // 2)),
        "another block scale": replace(instance, scale=scale),
    }
    if swapped != instance:
        wrong["formats of A and B swapped"] = swapped
    return MappingProxyType(wrong)


def spilled(code: MachineCode) -> MachineCode:
    """Return machine code as if a register were kept in memory: a control."""
    return replace(code, opcodes=MappingProxyType({**code.opcodes, "STL.64": 1}))


def _another(format_name: str) -> str:
    return next(name for name in MMA_FORMATS.values() if name != format_name)


def _check_multiply(code: MachineCode, instance: Instance) -> Iterator[str]:
    if code.arch != instance.arch:
        yield f"the code is for {code.arch}, not {instance.arch}"
    found = {name: n for name, n in code.opcodes.items() if name.split(".")[0] in _MULTIPLY}
    wanted = _multiply_names(instance)
    if not set(found) <= wanted or len(found) != 1:
        yield f"it multiplies with {_listed(found)}, not {' or '.join(sorted(wanted))}"
    steps = instance.tile.k // (64 if instance.kind in _FP4_KINDS else 32)
    if any(count % steps for count in found.values()):
        yield f"{_listed(found)} are not whole steps of {steps} along K"


def _multiply_names(instance: Instance) -> set[str]:
    """Return the names that the instruction of an instance may have."""
    if instance.machine.collectives == 90:
        return {f"QGMMA.64x{instance.tile.n}x32.F32.{_types(instance)}"}
    if instance.machine.collectives == 100:
        name = "UTCOMMA" if instance.kind in _FP4_KINDS else "UTCQMMA"
        pair = ".2CTA" if instance.tile.sms == 2 else ""
        # Four scales for 64 values: .4X on 10.0, .BLOCK16 on 10.3.
        scales = (".4X", ".BLOCK16") if instance.kind == "nvf4" else ("",)
        return {f"{name}{pair}{scale}" for scale in scales}
    scale = {BlockScale.NONE: "", BlockScale.MX32: ".E8", BlockScale.NV16: ".UE4M3.4X"}
    name = "OMMA.SF.16864" if instance.kind in _FP4_KINDS else "QMMA.SF.16832"
    if instance.scale is BlockScale.NONE:
        name = "QMMA.16832"
    return {f"{name}.F32.{_types(instance)}{scale[instance.scale]}"}


def _types(instance: Instance) -> str:
    return ".".join(FORMATS[name].short.upper() for name in (instance.a, instance.b))


def _check_moves(code: MachineCode, instance: Instance) -> Iterator[str]:
    """Check the instructions that move operands, scales and results."""
    scaled = instance.scale is not BlockScale.NONE
    machine = instance.machine.collectives
    bits = {FORMATS[name].storage_bits for name in (instance.a, instance.b)}
    unpacks = machine == 120 and instance.kind not in _FP4_KINDS
    expected = {
        "UTMALDG.3D": True,  # tiles of A and B
        "UTMALDG.4D": scaled,  # their scales
        "UTMASTG.3D": True,  # tiles of D
        "UTCCP": scaled and machine == 100,  # scales to tensor memory
        "LDTM": machine == 100,  # sums from tensor memory
        "LDSM.U4x16P64TO8": unpacks and 4 in bits,  # codes into bytes
        "LDSM.U6x16P32TO8": unpacks and 6 in bits,
    }
    codes = instance.quantized.element if instance.quantized else ""
    expected |= {convert: name == codes for name, convert in _CONVERTS.items()}
    for prefix, wanted in expected.items():
        there = any(f"{name}.".startswith(f"{prefix}.") for name in code.opcodes)
        if there != wanted:
            yield f"{prefix} is {'not there' if wanted else 'there'}"


def _check_descriptor(found: MmaDescriptor, instance: Instance) -> Iterator[str]:
    kinds = {"nvf4": ("mxf4nvf4",), "mxf4": ("mxf4", "mxf4nvf4")}
    scale = {BlockScale.NV16: "f8E4M3FN", BlockScale.MX32: "f8E8M0FNU", BlockScale.NONE: ""}
    tile = instance.tile
    rows = {
        "kind": (found.kind, kinds.get(instance.kind, (instance.kind,))),
        "format of A": (found.a, (instance.a,)),
        "format of B": (found.b, (instance.b,)),
        "M": (found.m, (tile.m,)),
        "N": (found.n, (tile.n,)),
        "block": (found.block, (instance.scale.block,)),
        "scales": (found.scale, (scale[instance.scale],)),
        "sums": (found.sums, ("f32",)),
        "SMs": (found.sms, (tile.sms,)),
        "K-major, dense, not negated": (found.plain, (True,)),
    }
    for name, (value, wanted) in rows.items():
        if value not in wanted:
            yield f"{name}: the descriptor says {value!r}, not {' or '.join(map(str, wanted))}"


def _listed(opcodes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in opcodes.items()) or "nothing"
