"""Builds a library of an artifact again, from nothing but the description of what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fpcompiler.codegen import attention, hopper
from fpcompiler.codegen.arch import arch
from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.cuda import quantize_source
from fpcompiler.codegen.cutlass.emit import emit
from fpcompiler.codegen.cutlass.record import parse_instance
from fpcompiler.codegen.kernel import KernelSource
from fpcompiler.codegen.torch_operators import OPERATORS, build_operators
from fpcompiler.errors import ArtifactError, FormatError
from fpcompiler.operand import Operand
from fpcompiler.options import Options
from fpcompiler.runtime.cuda import QuantizeProblem
from fpcompiler.runtime.cuda.attention import ATTENTION

__all__ = ["rebuild", "quantize_kernels", "describe_quantizers"]


def rebuild(role: str, problem: Mapping[str, Any], options: Options) -> Path:
    """Return a library that computes what an artifact describes, compiled if it is not there.

    Args:
        role: ``gemm``, ``quantize``, ``attention`` or ``operators``.
        problem: The description, from a file that nobody vouches for: no text of it gets into a
            source.
        options: Where compiled kernels and the compiler are.

    Raises:
        ArtifactError: If it describes nothing that this version generates.
        DependencyError: If a compiler or the package nvidia-cutlass is missing.
        TargetError: If it does not compile.
    """
    if role == OPERATORS:
        return build_operators(options)
    if role == "gemm":
        source = _gemm(dict(problem))
    elif role == "quantize":
        source = _quantizers(problem)
    elif role == ATTENTION:
        source = attention.parse(problem)
    else:
        raise ArtifactError(f"this version builds no kernels with the role {role!r}.")
    return KernelCache.from_options(options).build(source).path


def _gemm(problem: dict[str, Any]) -> KernelSource:
    if "mode" in problem:
        return hopper.emit(hopper.parse_instance(problem))
    return emit(parse_instance(problem))


def quantize_kernels(problems: Sequence[QuantizeProblem], arch_name: str) -> KernelSource:
    """Return the source of one library with kernels for some problems.

    Args:
        problems: What they compute.
        arch_name: The architecture's name.

    Raises:
        TargetError: If there are no such kernels for it.
    """
    made = quantize_source(problems, arch_name)
    description = describe_quantizers(problems, arch_name)
    return KernelSource(f"quantize_{arch_name}", made.text, arch_name, description=description)


def describe_quantizers(problems: Sequence[QuantizeProblem], arch_name: str) -> dict[str, Any]:
    """Return the problems of a library as JSON values, which :func:`rebuild` reads."""
    rows = [
        {**asdict(problem), "operand": str(problem.operand), "beside": list(problem.beside)}
        for problem in problems
    ]
    return {"arch": arch_name, "problems": rows}


def _quantizers(description: Mapping[str, Any]) -> KernelSource:
    try:
        problems = [_problem(row) for row in description["problems"]]
        name = arch(str(description["arch"])).name
    except (KeyError, TypeError, ValueError, FormatError) as error:
        raise ArtifactError(
            f"{description!r:.300} describes no kernels of this version ({error}); compile the "
            "model again."
        ) from error
    return quantize_kernels(problems, name)


def _problem(row: Mapping[str, Any]) -> QuantizeProblem:
    names = {field.name for field in fields(QuantizeProblem)}
    if {*row} != names:
        raise TypeError(f"it needs {', '.join(sorted(names))}")
    for name in ("swizzled", "given"):
        if type(row[name]) is not bool:
            raise TypeError(f"{name} is no truth value")
    if type(row["hadamard"]) is not int:
        raise TypeError("hadamard is no number")
    first, second, third, fourth = row["beside"]
    operand = Operand.parse(row["operand"])
    beside = (first, second, third, fourth)
    return QuantizeProblem(**{**row, "operand": operand, "beside": beside})
