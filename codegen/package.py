"""GPU kernels for a compiled model: which are needed, compiled, and put together as files.

Layers that differ in sizes only share kernels, so a model needs a few for each target. A layer
that a target has no kernel for is no error here: the reason stands in the index, and the runtime
says it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from fpcompiler.artifact import jsonfile
from fpcompiler.artifact.kernels import (
    INDEX,
    Instance,
    KernelIndex,
    LayerKernels,
    TargetKernels,
)
from fpcompiler.codegen import cutlass
from fpcompiler.codegen.arch import Arch, arch
from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.cutlass import heuristics
from fpcompiler.codegen.gemms import Gemm, gemms_of
from fpcompiler.codegen.kernel import BuiltKernel, KernelSource
from fpcompiler.codegen.legalize import legalize
from fpcompiler.codegen.problem import Epilogue, GemmProblem, Rows
from fpcompiler.errors import TargetError
from fpcompiler.options import Options
from fpcompiler.plan import Plan

__all__ = ["KernelPlan", "require_tools", "plan_kernels", "build_kernels", "package"]

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]

_GEMM: Final = "gemm"


@dataclass(frozen=True)
class KernelPlan:
    """The kernels that some GEMMs need on an architecture, before anything is compiled.

    Attributes:
        arch: The architecture.
        layers: For each layer the problem and the instance by range of rows, or the reason why
            there are none.
    """

    arch: Arch
    layers: Mapping[str, Mapping[Rows, tuple[GemmProblem, cutlass.Instance]] | str]

    @property
    def instances(self) -> tuple[cutlass.Instance, ...]:
        """The kernels to compile, each once."""
        found = {
            instance: None
            for kernels in self.layers.values()
            if not isinstance(kernels, str)
            for _, instance in kernels.values()
        }
        return tuple(found)


def require_tools(options: Options) -> None:
    """Check, before long work, that kernels can be compiled here.

    Args:
        options: The user's settings.

    Raises:
        DependencyError: If there is no nvcc, or CUTLASS is not installed.
    """
    KernelCache.from_options(options)
    cutlass.find_cutlass()


def plan_kernels(gemms: Sequence[Gemm], name: str) -> KernelPlan:
    """Return which kernels some GEMMs need.

    Args:
        gemms: The layers.
        name: The architecture, such as ``sm_100a``.

    Raises:
        TargetError: If kernels cannot be compiled for it at all.
    """
    machine = arch(name)
    problems = {gemm.layer: _problems(gemm, machine) for gemm in gemms}
    known = [p for rows in problems.values() if not isinstance(rows, str) for p in rows.values()]
    chosen = cutlass.choose(known, heuristics.load())
    return KernelPlan(
        machine,
        {
            layer: rows if isinstance(rows, str) else {r: (p, chosen[p]) for r, p in rows.items()}
            for layer, rows in problems.items()
        },
    )


def build_kernels(
    plans: Sequence[KernelPlan], cache: KernelCache, progress: Progress | None = None
) -> dict[cutlass.Instance, BuiltKernel]:
    """Return the kernels of some plans, compiled where the cache does not hold them.

    Args:
        plans: What is needed.
        cache: Where compiled kernels are kept.
        progress: Wraps what comes out one by one, for a progress bar.

    Raises:
        DependencyError: If CUTLASS is not installed.
        TargetError: If a kernel does not compile.
    """
    wanted = {instance: cutlass.emit(instance) for plan in plans for instance in plan.instances}
    built: Iterable[tuple[KernelSource, BuiltKernel]] = cache.stream([*wanted.values()])
    if progress is not None:
        built = progress(built, len(wanted), "compiling kernels")
    found = {source.name: kernel for source, kernel in built}
    return {instance: found[instance.name] for instance in wanted}


def package(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    targets: Sequence[str],
    options: Options,
    progress: Progress | None = None,
) -> dict[str, bytes]:
    """Return the files of kernels for some targets, as an artifact holds them.

    Args:
        plan: The compiled model.
        tensors: The tensors that it names.
        targets: Architectures, such as ``sm_100a``.
        options: The user's settings.
        progress: As for :func:`build_kernels`.

    Raises:
        DependencyError: If there is no nvcc, or CUTLASS is not installed.
        TargetError: If there is no such architecture, a kernel does not compile, or a target has
            no kernel for any layer.
    """
    gemms = gemms_of(plan, tensors)
    plans = [plan_kernels(gemms, target) for target in targets]
    for each in plans:
        _require_some(each)
    kernels = build_kernels(plans, KernelCache.from_options(options), progress)
    files: dict[str, bytes] = {}
    index = KernelIndex({each.arch.name: _target(each, kernels, files) for each in plans})
    return {INDEX: jsonfile.dump(index.to_json()), **files}


def _problems(gemm: Gemm, machine: Arch) -> dict[Rows, GemmProblem] | str:
    """Return the problem of a layer for each range of rows, or why there is none."""
    epilogue = Epilogue(bias=gemm.bias, activation=gemm.function)
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


def _require_some(plan: KernelPlan) -> None:
    reasons = [row for row in plan.layers.values() if isinstance(row, str)]
    if plan.layers and len(reasons) == len(plan.layers):
        raise TargetError(f"No layer has a kernel on {plan.arch.name}. The first: {reasons[0]}")


def _target(
    plan: KernelPlan,
    kernels: Mapping[cutlass.Instance, BuiltKernel],
    files: dict[str, bytes],
) -> TargetKernels:
    instances = {}
    for instance in plan.instances:
        kernel = kernels[instance]
        instances[instance.name] = _instance(instance, kernel, files)
    metadata = [kernels[instance].metadata for instance in plan.instances]
    toolchain = {
        "compiler": str(metadata[0]["toolchain"]),
        "headers": str(metadata[0]["headers"]),
    }
    capabilities = tuple(f"{major}.{minor}" for major, minor in plan.arch.capabilities)
    layers = {name: _layer(row) for name, row in plan.layers.items()}
    return TargetKernels(plan.arch.name, capabilities, toolchain, instances, layers)


def _instance(instance: cutlass.Instance, kernel: BuiltKernel, files: dict[str, bytes]) -> Instance:
    parts = {
        "library": (".so", kernel.path),
        "source": (".cu", kernel.source),
        "log": (".log", kernel.log),
    }
    names = {}
    for part, (suffix, path) in parts.items():
        names[part] = f"{instance.name}{suffix}"
        files[names[part]] = path.read_bytes()
    return Instance(
        name=instance.name,
        role=_GEMM,
        problem=cutlass.describe(instance),
        files=names,
        sha256=str(kernel.metadata["sha256"]),
    )


def _layer(row: Mapping[Rows, tuple[GemmProblem, cutlass.Instance]] | str) -> LayerKernels:
    if isinstance(row, str):
        return LayerKernels(reason=row)
    return LayerKernels({rows.value: instance.name for rows, (_, instance) in row.items()})
