"""Instances in the words of ``cutlass_library``: operations, descriptors, schedules."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from fpcompiler.codegen.cutlass.instance import Instance
from fpcompiler.codegen.cutlass.package import Cutlass
from fpcompiler.codegen.problem import BlockScale, OutputType
from fpcompiler.formats import FORMATS

__all__ = ["gemm_operation"]


def gemm_operation(instance: Instance, cutlass: Cutlass) -> Any:
    """Return the ``GemmOperation`` that describes an instance to CUTLASS's emitter."""
    lib = cutlass.library
    scaled = instance.scale is not BlockScale.NONE
    tile = instance.tile
    opcode = lib.OpcodeClass.BlockScaledTensorOp if scaled else lib.OpcodeClass.TensorOp
    scale = _scale_type(instance, lib)
    math = lib.MathInstruction(
        [tile.m, tile.n, tile.k // 4],
        _element(instance.a, lib),
        _element(instance.b, lib),
        lib.DataType.f32,
        opcode,
        lib.MathOperation.multiply_add,
        scale,
    )
    machine = instance.machine.collectives
    shape = lib.TileDescription(
        [tile.m, tile.n, tile.k], 0, [4, 1, 1], math, machine, machine, [*tile.cluster, 1]
    )
    quantized = instance.quantized
    out = getattr(lib.DataType, instance.output.value)
    out = _element(quantized.element, lib) if quantized else out
    kernel, epilogue = _schedules(instance, lib)
    return cutlass.gemm.GemmOperation(
        lib.GemmKind.BlockScaledUniversal3x if scaled else lib.GemmKind.Universal3x,
        machine,
        shape,
        _tensor(lib, instance, instance.a, lib.LayoutType.RowMajor),
        _tensor(lib, instance, instance.b, lib.LayoutType.ColumnMajor),
        _output(lib, instance, out if instance.residual else lib.DataType.void),
        lib.DataType.f32,
        D=_output(lib, instance, out),
        kernel_schedule=kernel,
        epilogue_schedule=epilogue,
        **_scale_factors(instance, lib, scale),
    )


def _scale_factors(instance: Instance, lib: ModuleType, scale: Any) -> dict[str, Any]:
    if scale is None:
        return {}
    none = lib.TensorDescription(lib.DataType.void, lib.LayoutType.RowMajor, 1)
    factors = {"tensor": none, "vector_size": instance.scale.block}
    return {"ScaleFactorA": scale, "ScaleFactorB": scale, "ScaleFactorD": factors}


def _schedules(instance: Instance, lib: ModuleType) -> tuple[Any, Any]:
    kernels, epilogues = lib.KernelScheduleType, lib.EpilogueScheduleType
    collectives = instance.machine.collectives
    if collectives == 90:
        # Not FP8FastAccum: its sums keep 13 fraction bits over all of K, these over one tile.
        name = f"TmaWarpSpecialized{'Pingpong' if instance.tile.pingpong else 'Cooperative'}"
        epilogue = name if not instance.tile.pingpong else "TmaWarpSpecialized"
        return kernels[name], epilogues[epilogue]
    prefix = {"mxf4": "Mxf4", "nvf4": "Nvf4", "mxf8f6f4": "Mxf8f6f4", "f8f6f4": ""}[instance.kind]
    if collectives == 120:
        name = f"{prefix}TmaWarpSpecializedCooperative{'Sm120' if prefix else ''}"
        return kernels[name], epilogues.ScheduleAuto
    sms = f"{instance.tile.sms}Sm"
    return kernels[f"{prefix}TmaWarpSpecialized{sms}Sm100"], epilogues[f"TmaWarpSpecialized{sms}"]


def _element(name: str, lib: ModuleType) -> Any:
    return getattr(lib.DataType, FORMATS[name].short.lower())


def _scale_type(instance: Instance, lib: ModuleType) -> Any:
    kinds = {BlockScale.MX32: lib.DataType.ue8m0, BlockScale.NV16: lib.DataType.ue4m3}
    return kinds.get(instance.scale)


def _tensor(lib: ModuleType, instance: Instance, element: str, layout: Any) -> Any:
    """Describe A or B; the alignment is in elements along K."""
    bits = FORMATS[element].storage_bits
    unpacked = instance.kind in ("mxf8f6f4", "f8f6f4") and bits < 8
    return lib.TensorDescription(_element(element, lib), layout, 128 if unpacked else 128 // bits)


def _output(lib: ModuleType, instance: Instance, element: Any) -> Any:
    alignment = 4 if instance.output is OutputType.F32 else 8
    if instance.quantized:
        # Six bits leave shared memory in lines of 128 elements.
        bits = instance.quantized.bits
        alignment = 128 if bits == 6 else 128 // bits
    return lib.TensorDescription(element, lib.LayoutType.RowMajor, alignment)
