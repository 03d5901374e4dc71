"""What runs a step, as reports call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fpcompiler.plan import Step
from fpcompiler.runtime.cuda.attention import CudaAttention
from fpcompiler.runtime.cuda.codes import CudaCodes
from fpcompiler.runtime.cuda.joined import CudaPart
from fpcompiler.runtime.cuda.layers import CudaLayer, QuantizingLayer
from fpcompiler.runtime.cuda.quantizers import CudaQuantizer, PassOn
from fpcompiler.runtime.expanded import ExpandedLayer
from fpcompiler.runtime.native_steps import NativeLayer, NativeQuantizer
from fpcompiler.runtime.onednn import OneDnnLayer
from fpcompiler.runtime.operators import Function
from fpcompiler.runtime.program.attention import NativeAttention
from fpcompiler.runtime.program.run import Program, Segment

NATIVE: Final = "native"
"""The native library; a quantizer that prepares natively what torch has computed counts too."""

ONEDNN: Final = "onednn"
"""The int8 product of oneDNN, which torch has."""

EXPANDED: Final = "fp32"
"""An fp32 product of torch's, of weights that are kept as bytes."""

CUDA: Final = "cuda"
"""A compiled kernel of the artifact; a quantizer in front of one that torch computes counts too."""

REFERENCE: Final = "reference"
"""An ``fpc`` operator, written in operators of torch."""

TORCH: Final = "torch"
"""Another operator, or arithmetic of sizes."""


def kernel_of(
    step: Step, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str:
    """Return what runs a step that is called with these arguments."""
    if isinstance(function, NativeLayer | NativeQuantizer):
        return NATIVE
    if isinstance(function, NativeAttention) and function.native_call(*args, **kwargs):
        return NATIVE
    return _without_library(step, function)


def kernels_of(program: Program) -> dict[int, str]:
    """Return what runs each step of a program that takes time, by the index of the step."""
    found: dict[int, str] = {}
    for item in program.items:
        if isinstance(item, Segment):
            found.update(dict.fromkeys(item.steps, NATIVE))
            continue
        step, function = item.instruction.step, item.instruction.function
        native = isinstance(function, NativeLayer | NativeQuantizer)
        # Attention that the library takes is part of a segment.
        found[item.index] = NATIVE if native else _without_library(step, function)
    return found


_ON_CUDA: Final = (
    CudaAttention, CudaCodes, CudaLayer, CudaPart, CudaQuantizer, PassOn, QuantizingLayer,
)  # fmt: skip


def _without_library(step: Step, function: Function) -> str:
    if isinstance(function, OneDnnLayer):
        return ONEDNN
    if isinstance(function, ExpandedLayer):
        return EXPANDED
    if isinstance(function, _ON_CUDA):
        return CUDA
    return REFERENCE if step.op.startswith("fpc.") else TORCH
