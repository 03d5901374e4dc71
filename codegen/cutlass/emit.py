"""From an instance to CUDA C++: CUTLASS's emitter, our epilogue, and a template with a C ABI.

The emitter of ``cutlass_library`` writes the types of the mainloop and of the kernel. It knows no
epilogue but CUTLASS's own, so it gets the name of ours (``Visitor``) as the text of its functor.
"""

from __future__ import annotations

import json
from importlib import resources
from string import Template
from types import ModuleType
from typing import Any, Final

from fpcompiler.codegen.cutlass.epilogue import epilogue_steps
from fpcompiler.codegen.cutlass.instance import Instance
from fpcompiler.codegen.cutlass.package import Cutlass, find_cutlass
from fpcompiler.codegen.cutlass.record import describe
from fpcompiler.codegen.kernel import KernelSource
from fpcompiler.codegen.problem import BlockScale, OutputType
from fpcompiler.formats import FORMATS

__all__ = ["emit"]

_INCLUDES: Final = (
    "cute/tensor.hpp",
    "cutlass/detail/sm100_blockscaled_layout.hpp",
    "cutlass/epilogue/fusion/operations.hpp",
    "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp",
    "cutlass/epilogue/thread/activation.h",
    "cutlass/gemm/device/gemm_universal_adapter.h",
    "cutlass/util/packed_stride.hpp",
)


def emit(instance: Instance, cutlass: Cutlass | None = None) -> KernelSource:
    """Return the source of an instance; the same text for the same instance, anywhere.

    Args:
        instance: What to generate.
        cutlass: The package; by default the installed one.

    Raises:
        DependencyError: If CUTLASS is not installed, or in another version.
    """
    cutlass = cutlass or find_cutlass()
    name, machine = instance.name, instance.machine.collectives
    operation = _operation(instance, cutlass)
    emitter = cutlass.gemm.EmitGemmUniversal3xInstance()
    emitter.builtin_epilogue_functor_template = "Visitor"
    if machine == 100 and instance.tile.n == 256:
        # Left to itself, CUTLASS takes 64 columns at a time for tiles this wide, and vectors over N
        # then need so many registers that they spill; 32 is what it takes for other tiles.
        narrow = "cute::Shape<cute::_128, cute::_32>"
        emitter.gemm_template = emitter.gemm_template.replace("${epi_tile_mn}", narrow)
    includes = dict.fromkeys((*emitter.includes, *_INCLUDES))
    steps = epilogue_steps(instance)
    description = describe(instance)
    values = {
        "name": name,
        "includes": "\n".join(f'#include "{name}"' for name in includes),
        "abi": _template("kernel_abi.h").replace("#pragma once\n", ""),
        "cta_tile": ", ".join(f"_{size}" for size in instance.tile.of_one_sm),
        "declarations": "\n".join(step.declaration for step in steps),
        "initializers": "\n".join(f"  const {step.initializer}" for step in steps),
        "visitor": steps[-1].alias,
        "visitor_value": steps[-1].alias.lower(),
        # The name in profilers: CUTLASS's own is longer and leaves out the epilogue.
        "kernel": _tidy(emitter.emit(operation)).replace(operation.procedural_name(), name),
        "epilogue_tile": "CtaTileShape" if machine == 100 else "CtaTileMNK",
        "description": json.dumps(description, sort_keys=True),
        **_scale_values(instance),
        **_residual_values(instance),
    }
    text = Template(_template("gemm.cu")).substitute(values)
    headers = f"nvidia-cutlass {cutlass.version}"
    return KernelSource(name, text, instance.arch, cutlass.include, headers, description)


def _scale_values(instance: Instance) -> dict[str, str]:
    if instance.scale is BlockScale.NONE:
        return {
            "has_scales": "false",
            "scale_arguments": "",
            "scale_functions": _template("scales_none.cu"),
        }
    return {
        "has_scales": "true",
        "scale_arguments": _template("scale_arguments.cu"),
        "scale_functions": _template("scales_block.cu"),
    }


def _residual_values(instance: Instance) -> dict[str, str]:
    if not instance.residual:
        return {"has_residual": "false", "residual_value": "nullptr", "residual_stride": "{}"}
    value = "static_cast<decltype(out.epilogue.ptr_C)>(args.residual)"
    return {"has_residual": "true", "residual_value": value, "residual_stride": "stride_d"}


def _operation(instance: Instance, cutlass: Cutlass) -> Any:
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
    out = getattr(lib.DataType, instance.output.value)
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
    return lib.TensorDescription(element, lib.LayoutType.RowMajor, alignment)


def _tidy(text: str) -> str:
    """Return C++ without the emitter's empty lines and trailing spaces."""
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def _template(name: str) -> str:
    folder = resources.files("fpcompiler.codegen.cutlass") / "templates"
    return (folder / name).read_text(encoding="utf-8")
