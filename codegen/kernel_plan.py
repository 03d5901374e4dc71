"""Which kernels the layers of a model need on a GPU, before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fpcompiler.codegen import cutlass, hopper
from fpcompiler.codegen.arch import Arch, arch
from fpcompiler.codegen.cutlass import heuristics
from fpcompiler.codegen.gemms import Gemm
from fpcompiler.codegen.hopper import packed_gemm
from fpcompiler.codegen.kernel import KernelSource
from fpcompiler.codegen.legalize import legalize
from fpcompiler.codegen.problem import Epilogue, GemmProblem, OutputType, Rows
from fpcompiler.errors import TargetError, describe_layer

__all__ = ["GemmInstance", "KernelPlan", "describe", "emit", "plan_kernels"]

GemmInstance = cutlass.Instance | hopper.PackedGemm


@dataclass(frozen=True)
class KernelPlan:
    """The kernels that some GEMMs need on an architecture, before anything is compiled.

    Attributes:
        arch: The architecture.
        layers: For each layer the instance by range of rows, or the reason why there are none.
        quantized: Those that quantize outputs for the next layers, where there are some.
    """

    arch: Arch
    layers: Mapping[str, Mapping[Rows, GemmInstance] | str]
    quantized: Mapping[str, Mapping[Rows, cutlass.Instance]] = field(default_factory=dict)

    @property
    def instances(self) -> tuple[GemmInstance, ...]:
        """The kernels to compile, each once."""
        found = {
            instance: None
            for kernels in (*self.layers.values(), *self.quantized.values())
            if not isinstance(kernels, str)
            for instance in kernels.values()
        }
        return tuple(found)


def plan_kernels(gemms: Sequence[Gemm], name: str) -> KernelPlan:
    """Return which kernels some GEMMs need.

    Args:
        gemms: The layers.
        name: The architecture, such as ``sm_100a``.

    Raises:
        TargetError: If kernels cannot be compiled for it at all.
    """
    machine = arch(name)
    packed = {gemm.layer: _packed(gemm, machine) for gemm in gemms}
    problems = {g.layer: _problems(g, machine) for g in gemms if packed[g.layer] is None}
    known = [p for rows in problems.values() if not isinstance(rows, str) for p in rows.values()]
    chosen = cutlass.choose(known, heuristics.load())
    layers: dict[str, Mapping[Rows, GemmInstance] | str] = {}
    for layer, instance in packed.items():
        if instance is not None:
            layers[layer] = dict.fromkeys(Rows, instance)
            continue
        rows = problems[layer]
        layers[layer] = rows if isinstance(rows, str) else {r: chosen[p] for r, p in rows.items()}
    return KernelPlan(machine, layers)


def emit(instance: GemmInstance) -> KernelSource:
    """Return the source of a kernel, whoever generates it.

    Raises:
        DependencyError: If it takes CUTLASS, and that is not installed.
    """
    return (
        hopper.emit(instance) if isinstance(instance, hopper.PackedGemm) else cutlass.emit(instance)
    )


def describe(instance: GemmInstance) -> dict[str, Any]:
    """Return an instance as JSON values, from which it can be generated again."""
    if isinstance(instance, hopper.PackedGemm):
        return hopper.describe(instance)
    return cutlass.describe(instance)


def _packed(gemm: Gemm, machine: Arch) -> hopper.PackedGemm | None:
    """Return the kernels that keep the weights of a layer in four bits, if there are some."""
    found = _packed_of_any_length(gemm, machine)
    return found if gemm.k <= hopper.MOST_K else None


def _packed_of_any_length(gemm: Gemm, machine: Arch) -> hopper.PackedGemm | None:
    return packed_gemm(gemm.weight, gemm.activation, machine.name, gemm.output, gemm.function)


def _problems(gemm: Gemm, machine: Arch) -> dict[Rows, GemmProblem] | str:
    """Return the problem of a layer for each range of rows, or why there is none."""
    as_bf16 = packed_gemm(gemm.weight, gemm.activation, machine.name, OutputType.BF16)
    if as_bf16 is not None and gemm.activation is None and gemm.output is not OutputType.BF16:
        return (
            f"{describe_layer(gemm.layer)}: its kernel on {machine.name} multiplies activations "
            f"that are not quantized in bf16, and this model has {gemm.output.value}. Convert it "
            "to bfloat16 before it is compiled."
        )
    if gemm.k > hopper.MOST_K and _packed_of_any_length(gemm, machine) is not None:
        return (
            f"{describe_layer(gemm.layer)}: a row of its weights has {gemm.k} numbers, and kernels "
            f"of packed weights take up to {hopper.MOST_K}."
        )
    epilogue = Epilogue(bias=gemm.bias, activation=gemm.function, residual=gemm.residual)
    try:
        return {
            rows: legalize(
                gemm.layer,
                gemm.weight,
                gemm.activation,
                (gemm.n, gemm.k),
                machine.name,
                rows=rows,
                epilogue=epilogue,
                output=gemm.output,
            )
            for rows in Rows
        }
    except TargetError as error:
        return str(error)
