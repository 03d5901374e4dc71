"""From an instance to CUDA C++: CUTLASS's emitter, our epilogue, and a template with a C ABI.

The emitter of ``cutlass_library`` writes the types of the mainloop and of the kernel. It knows no
epilogue but CUTLASS's own, so it gets the name of ours (``Visitor``) as the text of its functor.
"""

from __future__ import annotations

import json
from importlib import resources
from string import Template
from typing import Final

from fpcompiler.codegen.cutlass.epilogue import epilogue_steps
from fpcompiler.codegen.cutlass.instance import Instance
from fpcompiler.codegen.cutlass.operation import gemm_operation
from fpcompiler.codegen.cutlass.package import Cutlass, find_cutlass
from fpcompiler.codegen.cutlass.quantized import CPP_ELEMENT, device_code
from fpcompiler.codegen.cutlass.record import describe
from fpcompiler.codegen.kernel import KernelSource
from fpcompiler.codegen.problem import BlockScale

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
    description = describe(instance)
    values = {
        "name": instance.name,
        "abi": _interface(instance),
        "description": json.dumps(description, sort_keys=True),
        **_kernel_values(instance, cutlass),
        **_epilogue_values(instance),
        **_scale_values(instance),
        **_residual_values(instance),
        "quantized_bits": _quantized_bits(instance),
    }
    template = _template("gemm.cu")
    if instance.quantized:
        template = template.replace("FpcGemmArguments", "FpcQuantizingArguments")
    text = Template(template).substitute(values)
    headers = f"nvidia-cutlass {cutlass.version}"
    return KernelSource(instance.name, text, instance.arch, cutlass.include, headers, description)


def _kernel_values(instance: Instance, cutlass: Cutlass) -> dict[str, str]:
    operation = gemm_operation(instance, cutlass)
    emitter = cutlass.gemm.EmitGemmUniversal3xInstance()
    emitter.builtin_epilogue_functor_template = "Visitor"
    codes = instance.quantized.bits if instance.quantized else 0
    if instance.machine.collectives == 100 and (instance.tile.n == 256 or codes in (4, 8)):
        # Left to itself, CUTLASS takes 64 columns at a time for tiles this wide and for codes of
        # four bits, and vectors over N then need so many registers that they spill; 32 is what it
        # takes for other tiles.
        narrow = "cute::Shape<cute::_128, cute::_32>"
        emitter.gemm_template = emitter.gemm_template.replace("${epi_tile_mn}", narrow)
    includes = dict.fromkeys((*emitter.includes, *_INCLUDES))
    text = emitter.emit(operation)
    return {
        "includes": "\n".join(f'#include "{name}"' for name in includes),
        # The name in profilers: CUTLASS's own is longer and leaves out the epilogue.
        "kernel": _tidy(text).replace(operation.procedural_name(), instance.name),
    }


def _epilogue_values(instance: Instance) -> dict[str, str]:
    steps = epilogue_steps(instance)
    visitor, value = steps[-1].alias, steps[-1].alias.lower()
    if instance.quantized:
        value = f"{{{value}, {{static_cast<uint8_t*>(args.d_scales), args.status}}}}"
        visitor = f"fusion::Sm90EVT<{_quantizing_node(instance)}, {visitor}>"
    return {
        "cta_tile": ", ".join(f"_{size}" for size in instance.tile.of_one_sm),
        "epilogue_tile": "CtaTileShape" if instance.machine.collectives == 100 else "CtaTileMNK",
        "declarations": "\n".join(step.declaration for step in steps),
        "initializers": "\n".join(f"  const {step.initializer}" for step in steps),
        "visitor": visitor,
        "visitor_value": value,
    }


def _quantizing_node(instance: Instance) -> str:
    """Return the C++ type of the node that quantizes; its tile is the one CUTLASS takes."""
    assert instance.quantized is not None
    if instance.machine.collectives == 100:
        return f"QuantizedRow100<Problem0, {CPP_ELEMENT[instance.quantized.element]}>"
    columns = 128 if instance.quantized.bits == 6 else 32
    return f"QuantizedRow120<Problem0, Shape<_64, _{columns}>>"


def _interface(instance: Instance) -> str:
    """Return the C interface, and for an output that is quantized what computes that."""
    plain = _template("kernel_abi.h").replace("#pragma once\n", "")
    if instance.quantized is None:
        return plain
    names = (
        "namespace fpc {\nusing namespace cute;\nnamespace fusion = cutlass::epilogue::fusion;\n}"
    )
    parts = (
        plain, _template("quantize_abi.h"),
        device_code(instance.quantized, instance.output.value), names,
        _template("quantized_rows.h"),
    )  # fmt: skip
    return "\n".join(parts)


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


def _quantized_bits(instance: Instance) -> str:
    """Return the function that tells what D has, where it is not the output."""
    if instance.quantized is None:
        return ""
    bits = instance.quantized.bits
    return (
        "\n// Bits of the codes that D has.\n"
        f"FPC_EXPORT int32_t fpc_gemm_quantized_bits() {{ return {bits}; }}\n"
    )


def _tidy(text: str) -> str:
    """Return C++ without the emitter's empty lines and trailing spaces."""
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def _template(name: str) -> str:
    folder = resources.files("fpcompiler.codegen.cutlass") / "templates"
    return (folder / name).read_text(encoding="utf-8")
