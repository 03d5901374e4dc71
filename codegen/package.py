"""GPU kernels for a compiled model, compiled and put together as files.

Layers that differ in sizes only share kernels, so a model needs a few for each target. A layer
that a target has no kernel for is no error here: the reason stands in the index, and the runtime
says it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fpcompiler.artifact import jsonfile
from fpcompiler.artifact.kernels import (
    INDEX,
    QUANTIZED_USES,
    Instance,
    KernelIndex,
    LayerKernels,
    TargetKernels,
)
from fpcompiler.codegen import cutlass
from fpcompiler.codegen.attention import ARCHS as ATTEND_ARCHS
from fpcompiler.codegen.attention import attend_kernels, attend_problems
from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.gemms import gemms_of
from fpcompiler.codegen.hopper import packed_gemm
from fpcompiler.codegen.kernel import BuiltKernel, KernelSource
from fpcompiler.codegen.kernel_plan import GemmInstance, KernelPlan, describe, emit, plan_kernels
from fpcompiler.codegen.problem import OutputType, Rows
from fpcompiler.codegen.proof.stored import recorded_proof
from fpcompiler.codegen.quantize_problems import quantize_problems
from fpcompiler.codegen.quantized_outputs import quantized_outputs
from fpcompiler.codegen.rebuild import quantize_kernels
from fpcompiler.codegen.torch_operators import OPERATORS, build_operators
from fpcompiler.errors import TargetError
from fpcompiler.options import Options
from fpcompiler.plan import Plan
from fpcompiler.runtime.cuda.attention import ATTENTION
from fpcompiler.runtime.cuda.problem import QuantizeProblem
from fpcompiler.runtime.executor import Executor
from fpcompiler.scheme import LayerScheme, Scheme

__all__ = ["require_tools", "build_sources", "package"]

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


def require_tools(options: Options, scheme: Scheme, archs: Sequence[str]) -> None:
    """Check, before long work, that kernels can be compiled here.

    Args:
        options: The user's settings.
        scheme: The formats of the layers. A method may change some, so that a layer takes CUTLASS
            where the scheme does not: that is said when its kernel is generated.
        archs: What kernels are compiled for, such as ``sm_100a``.

    Raises:
        DependencyError: If there is no nvcc, or CUTLASS is needed and not installed.
        OptionError: If compiled kernels cannot be kept.
    """
    KernelCache.from_options(options).require_folder()
    layers = (scheme.base, *(rule.layer for rule in scheme.rules))
    if any(_takes_cutlass(layer, name) for layer in layers for name in archs):
        cutlass.find_cutlass()


def build_sources(
    sources: Sequence[KernelSource], cache: KernelCache, progress: Progress | None = None
) -> dict[str, BuiltKernel]:
    """Return kernels by name, compiled where the cache does not hold them.

    Args:
        sources: What is needed; each name once.
        cache: Where compiled kernels are kept.
        progress: Wraps what comes out one by one, for a progress bar.

    Raises:
        TargetError: If a kernel does not compile.
    """
    built: Iterable[tuple[KernelSource, BuiltKernel]] = cache.stream(sources)
    if progress is not None:
        built = progress(built, len(sources), "compiling kernels")
    return {source.name: kernel for source, kernel in built}


def package(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    call: Sequence[Tensor],
    targets: Sequence[str],
    options: Options,
    progress: Progress | None = None,
) -> dict[str, bytes]:
    """Return the files of kernels for some targets, as an artifact holds them.

    Args:
        plan: The compiled model.
        tensors: The tensors that it names.
        call: The tensors of a call, which is run to see what is quantized; without one, torch
            quantizes.
        targets: Architectures, such as ``sm_100a``.
        options: The user's settings.
        progress: Wraps what comes out one by one, for a progress bar.

    Raises:
        DependencyError: If there is no nvcc, or CUTLASS is needed and not installed.
        TargetError: If there is no such architecture, a kernel does not compile, or a target has
            no kernel for any layer.
    """
    gemms = gemms_of(plan, tensors)
    outputs = {gemm.layer: gemm.n for gemm in gemms}
    plans = [plan_kernels(gemms, target) for target in targets]
    plans = [replace(p, quantized=quantized_outputs(plan, p.layers, outputs)) for p in plans]
    for each in plans:
        _require_some(each)
    executor = Executor(plan, tensors)
    quantizers = [_Quantizers.of(each, executor, call) for each in plans]
    sources = [emit(instance) for each in plans for instance in each.instances]
    sources += [each.source for each in quantizers if each.source is not None]
    attention = _attention(executor, call, targets)
    sources += attention.values()
    kernels = build_sources(sources, KernelCache.from_options(options), progress)
    generated = [i for each in plans for i in each.instances if isinstance(i, cutlass.Instance)]
    proofs = _proofs([kernels[instance.name] for instance in generated], options, progress)
    files: dict[str, bytes] = {}
    packer = _Packer(kernels, proofs, _operators(options, files), files)
    parts = zip(plans, quantizers, strict=True)
    index = KernelIndex(
        {p.arch.name: packer.target(p, q, attention.get(p.arch.name)) for p, q in parts}
    )
    return {INDEX: jsonfile.dump(index.to_json()), **files}


@dataclass(frozen=True)
class _Quantizers:
    """The kernels that quantize inputs on one target: one library.

    Attributes:
        layers: The layers whose input they quantize.
        problems: What they compute.
        source: The library's source; None if there are none.
    """

    layers: frozenset[str]
    problems: tuple[QuantizeProblem, ...]
    source: KernelSource | None

    @classmethod
    def of(cls, kernels: KernelPlan, executor: Executor, call: Sequence[Tensor]) -> _Quantizers:
        """Return those for the layers that have GEMMs, if there is a call that shows types."""
        elements = {
            layer: next(iter(row.values())).a
            for layer, row in kernels.layers.items()
            if not isinstance(row, str)
        }
        if not call:
            return cls(frozenset(), (), None)
        layers, codes = quantize_problems(executor, call, elements)
        problems = tuple(dict.fromkeys((*layers.values(), *codes)))
        source = quantize_kernels(problems, kernels.arch.name) if problems else None
        return cls(frozenset(layers), problems, source)


def _attention(
    executor: Executor, call: Sequence[Tensor], targets: Sequence[str]
) -> dict[str, KernelSource]:
    """Return the library of attention for each target that has one."""
    problems = attend_problems(executor, call) if call else ()
    archs = [name for name in targets if name in ATTEND_ARCHS and problems]
    return {name: attend_kernels(problems, name) for name in archs}


def _takes_cutlass(layer: LayerScheme, arch_name: str) -> bool:
    """Return whether the kernels of such a layer are generated with CUTLASS, if it gets any."""
    if layer.weight is None:
        return False
    return packed_gemm(layer.weight, layer.activation, arch_name, OutputType.BF16) is None


def _require_some(plan: KernelPlan) -> None:
    reasons = [row for row in plan.layers.values() if isinstance(row, str)]
    if not plan.layers:
        raise TargetError(
            f"The model has no quantized linear layers, so there are no kernels for "
            f"{plan.arch.name} to compile. Leave that target out, or choose another scheme."
        )
    if len(reasons) == len(plan.layers):
        raise TargetError(f"No layer has a kernel on {plan.arch.name}. The first: {reasons[0]}")


def _proofs(
    kernels: Sequence[BuiltKernel], options: Options, progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Return what was checked of each kernel, by name.

    Raises:
        TargetError: If a check failed: such a kernel is not given to anyone.
    """
    todo: Iterable[BuiltKernel] = kernels
    if progress is not None:
        todo = progress(kernels, len(kernels), "checking kernels")
    records = {}
    for kernel in todo:
        record = recorded_proof(kernel, options)
        failed = [check for check in record["checks"] if check["outcome"] == "failed"]
        if failed:
            first = failed[0]
            found = "; ".join(first["findings"]) or "a control was not noticed"
            raise TargetError(
                f"{record['kernel']} was compiled, but does not pass {first['level']}, "
                f"{first['name']}: {found}. This is a defect of fpcompiler or of the compiler "
                f"({record['toolchain']}); please report it."
            )
        records[record["kernel"]] = record
    return records


@dataclass(frozen=True)
class _Packer:
    """Puts kernels among the files of an artifact and says what they are."""

    kernels: Mapping[str, BuiltKernel]
    proofs: Mapping[str, Mapping[str, Any]]
    operators: Instance
    files: dict[str, bytes]

    def target(
        self, plan: KernelPlan, quantizers: _Quantizers, attention: KernelSource | None
    ) -> TargetKernels:
        """Return what an index says of a target."""
        instances = {self.operators.name: self.operators}
        for gemm in plan.instances:
            instances[gemm.name] = self._instance("gemm", gemm.name, describe(gemm))
        name = ""
        if quantizers.source is not None:
            name = quantizers.source.name
            instances[name] = self._instance("quantize", name, quantizers.source.description)
        if attention is not None:
            made = self._instance(ATTENTION, attention.name, attention.description)
            instances[attention.name] = made
        built = [self.kernels[gemm.name].metadata for gemm in plan.instances]
        headers = {str(metadata["headers"]): None for metadata in built if metadata["headers"]}
        layers = {
            layer: _layer(
                row, name if layer in quantizers.layers else "", plan.quantized.get(layer, {})
            )
            for layer, row in plan.layers.items()
        }
        return TargetKernels(
            target=plan.arch.name,
            capabilities=tuple(f"{major}.{minor}" for major, minor in plan.arch.capabilities),
            toolchain={
                "compiler": str(built[0]["toolchain"]),
                "headers": ", ".join(headers),
            },
            instances=instances,
            layers=layers,
        )

    def _instance(self, role: str, name: str, problem: Mapping[str, Any]) -> Instance:
        kernel = self.kernels[name]
        parts = {
            "library": (".so", kernel.path.read_bytes()),
            "source": (".cu", kernel.source.read_bytes()),
            "log": (".log", kernel.log.read_bytes()),
        }
        if name in self.proofs:
            record = self.proofs[name]
            parts["proof"] = (".proof.json", jsonfile.dump(record))
            if record["machine_code"]:
                parts["sass"] = (".sass.json", jsonfile.dump(record["machine_code"]))
        self.files.update({f"{name}{suffix}": data for suffix, data in parts.values()})
        named = {part: f"{name}{suffix}" for part, (suffix, _) in parts.items()}
        return Instance(name, role, problem, named, str(kernel.metadata["sha256"]))


def _operators(options: Options, files: dict[str, bytes]) -> Instance:
    """Return the library through which torch calls kernels, the same for all targets."""
    data = build_operators(options).read_bytes()
    file = f"{OPERATORS}.so"
    files[file] = data
    digest = hashlib.sha256(data).hexdigest()
    return Instance(OPERATORS, OPERATORS, {}, {"library": file}, digest)


def _layer(
    row: Mapping[Rows, GemmInstance] | str,
    quantizer: str,
    quantized: Mapping[Rows, cutlass.Instance],
) -> LayerKernels:
    if isinstance(row, str):
        return LayerKernels(reason=row)
    kernels = {rows.value: instance.name for rows, instance in row.items()}
    uses = zip(QUANTIZED_USES, Rows, strict=True)
    kernels |= {use: quantized[rows].name for use, rows in uses if rows in quantized}
    return LayerKernels({**kernels, **({"quantize": quantizer} if quantizer else {})})
