"""Which layers a kernel of packed weights computes, and how it multiplies them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from fpcompiler.codegen.kernel import refusing_descriptions
from fpcompiler.codegen.problem import Activation, BlockScale, OutputType
from fpcompiler.formats import FORMATS
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda.fragments import Mode, decodes, mode_of

__all__ = ["PackedGemm", "packed_gemm", "describe", "parse_instance", "MOST_K"]

ARCH: Final = "sm_90a"
MOST_K: Final = 1 << 16
"""The longest row that kernels take: ``kLongest`` of launch_many.h."""
_ENUMS: Final = {
    "mode": Mode,
    "scale": BlockScale,
    "output": OutputType,
    "activation": Activation,
}


@dataclass(frozen=True)
class PackedGemm:
    """One library to compile: kernels for few and for many rows of activations.

    Attributes:
        arch: The architecture's name.
        mode: What the tensor cores multiply.
        b: Element format of the weights, four bits.
        scale: The scales of blocks of weights.
        output: Element type of the result.
        activation: The function of the result.
    """

    arch: str
    mode: Mode
    b: str
    scale: BlockScale
    output: OutputType
    activation: Activation

    @property
    def a(self) -> str:
        """What activations are: ``i8``, ``f8E4M3FN`` or ``bf16``."""
        return self.mode.element

    @property
    def name(self) -> str:
        """A name for people and files, different for different instances."""
        scale = {0: "", 16: "_nv16", 32: "_mx32"}[self.scale.block]
        act = "" if self.activation is Activation.NONE else f"_{self.activation.value}"
        weight = FORMATS[self.b].short.lower()
        return f"packed_{self.arch}_{self.mode.value}_{weight}{scale}_{self.output.value}{act}"


def packed_gemm(
    weight: Operand,
    activation: Operand | None,
    arch: str,
    output: OutputType,
    function: Activation = Activation.NONE,
) -> PackedGemm | None:
    """Return the kernels for a layer, or None if there are none of this kind.

    Args:
        weight: The weights' operand.
        activation: The activations' operand; None for plain bf16, which takes results in bf16.
        arch: The architecture's name.
        output: The element type of the result.
        function: The function of the result.
    """
    scale = {"": BlockScale.NONE, **{each.value: each for each in BlockScale}}.get(_block(weight))
    if arch != ARCH or scale is None or function is Activation.RELU:
        return None
    mode = mode_of(weight, activation)
    if mode is None or (activation is None and output is not OutputType.BF16):
        return None
    return PackedGemm(arch, mode, weight.format.name, scale, output, function)


def describe(instance: PackedGemm) -> dict[str, Any]:
    """Return an instance as JSON values, as the runtime and :func:`parse_instance` read it.

    These kernels add a residual where they are given one: ``residual`` says that none is needed.
    """
    values = asdict(instance)
    named = {name: values[name].value for name in _ENUMS}
    return {**values, **named, "a": instance.a, "residual": False}


def parse_instance(values: object) -> PackedGemm:
    """Return the instance that :func:`describe` described.

    Only what this version generates is accepted: no text of a file gets into a source.

    Raises:
        ArtifactError: If it is none.
    """
    with refusing_descriptions(values):
        return _instance(values)


def _instance(values: object) -> PackedGemm:
    names = {field.name for field in fields(PackedGemm)}
    if type(values) is not dict or set(values) != {*names, "a", "residual"}:
        raise TypeError(f"it needs {', '.join(sorted(names))}")
    own = {name: values[name] for name in names}
    instance = PackedGemm(**{**own, **{name: kind(own[name]) for name, kind in _ENUMS.items()}})
    if instance.arch != ARCH:
        raise ValueError(f"there are none for {instance.arch!r}")
    if describe(instance) != values or values["residual"] is not False:
        raise ValueError("its parts contradict each other")
    scaled = instance.scale is not BlockScale.NONE
    wrong = not decodes(instance.mode, FORMATS[instance.b]) or (
        scaled and instance.mode is not Mode.BF16
    )
    if wrong or instance.activation is Activation.RELU:
        raise ValueError(f"{instance.mode.value} multiplies no such weights")
    return instance


def _block(operand: Operand) -> str:
    return f"block{operand.block.block}:{operand.block.format}" if operand.block else ""
