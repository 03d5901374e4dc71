"""From a layer's operands to a ``GemmProblem``, or the reason why there is no kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fpcompiler.codegen.arch import Arch, arch
from fpcompiler.codegen.container import NATIVE, container_for
from fpcompiler.codegen.problem import BlockScale, Epilogue, GemmProblem, OutputType, Rows
from fpcompiler.errors import TargetError, describe_layer
from fpcompiler.operand import Granularity, Operand
from fpcompiler.target import GemmKind

__all__ = ["legalize"]

_SCALES: Final = {"": BlockScale.NONE, **{scale.value: scale for scale in BlockScale}}


def legalize(
    layer: str,
    weight: Operand,
    activation: Operand | None,
    shape: tuple[int, int],
    arch_name: str,
    *,
    rows: Rows,
    epilogue: Epilogue | None = None,
    output: OutputType = OutputType.BF16,
) -> GemmProblem:
    """Return the GEMM that computes a layer exactly, in formats that an instruction reads.

    A format that no instruction reads is stored in the narrowest one that holds its values exactly;
    what the containers shift goes into alpha.

    Args:
        layer: The layer's name, for errors.
        weight: The weights' operand.
        activation: The activations' operand; None for 16 bits or more.
        shape: Output and input channels: N and K.
        arch_name: The architecture.
        rows: The range of M.
        epilogue: Bias, activation and residual; what it says of scales is replaced by what the
            operands have.
        output: The element type of the result.

    Raises:
        TargetError: If there is no kernel for the pair; the message names the layer, the cause and
            the pairs that have one.
    """
    machine = arch(arch_name)
    kind = _kind(layer, weight, activation, machine)
    assert activation is not None
    containers = [container_for(operand.format, kind.name) for operand in (weight, activation)]
    shift = sum(container.shift for container in containers)
    n, k = shape
    if min(n, k) < 1:
        raise TargetError(f"{describe_layer(layer)}: there is no GEMM of N = {n} and K = {k}.")
    problem = GemmProblem(
        arch=machine.name,
        kind=kind.name,
        weight=containers[0],
        activation=containers[1],
        scale=_SCALES[kind.blocks[0]],
        n=n,
        k=k,
        rows=rows,
        output=output,
    )
    return replace(
        problem, epilogue=_with_scales(epilogue or Epilogue(), weight, activation, shift)
    )


def _with_scales(epilogue: Epilogue, weight: Operand, activation: Operand, shift: int) -> Epilogue:
    levels = [operand.outer for operand in (weight, activation)]
    tensors = [level for level in levels if level and level.granularity is Granularity.TENSOR]
    # Of a weight a row is what of an activation is a token: all values along K.
    vectors = [bool(level) and level not in tensors for level in levels]
    return replace(
        epilogue,
        alpha=bool(tensors) or shift != 0,
        row_scale=vectors[0],
        token_scale=vectors[1],
    )


def _kind(layer: str, weight: Operand, activation: Operand | None, machine: Arch) -> GemmKind:
    """Return the kind of instruction with kernels that takes a pair, or raise the reason."""
    found = [kind for kind in machine.facts.kinds if kind.takes(weight, activation)]
    native = [kind for kind in found if kind.name in NATIVE]
    if native:
        return native[0]
    kind = found[0] if found else None
    pair = f"w={weight},a={activation or 'none'}"
    if activation is None:
        cause = "its activations have 16 bits, and FP4 weights are multiplied with FP8 or less only"
    elif kind is None:
        cause = "no instruction takes this pair of formats and scales"
    else:
        cause = f"the hardware multiplies it only after decoding to {kind.name}"
    raise TargetError(
        f"{describe_layer(layer)}: there is no FP4 kernel for {pair} on {machine.name}: {cause}. "
        f"Kernels there take {_choices(machine)}; choose such a scheme, or keep the layer "
        "out of it with a rule (skip=...)."
    )


def _choices(machine: Arch) -> str:
    kinds = [kind for kind in machine.facts.kinds if kind.name in NATIVE]
    return "; ".join(f"{_short(kind)} ({kind.name})" for kind in kinds)


def _short(kind: GemmKind) -> str:
    names = ", ".join(name[2:].removesuffix("FN") for name in kind.weights)
    block = kind.blocks[0]
    scales = f"@{block}" if block else " with a scale for the tensor, or per row and token"
    return f"{names}{scales}"
