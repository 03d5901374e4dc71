"""The end of an instance's epilogue as a visitor tree, in C++.

All instances scale and add a bias; the template ``gemm.cu`` has that part. Its leaves broadcast a
constant where their pointer is null (a scale of one, a bias of zero), which costs less than kernels
for all combinations. The function and the residual, which cannot be null, are added here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fpcompiler.codegen.cutlass.instance import Instance
from fpcompiler.codegen.problem import Activation, OutputType

__all__ = ["Step", "epilogue_steps", "CPP_OUTPUT"]

CPP_OUTPUT: Final = {
    OutputType.BF16: "cutlass::bfloat16_t",
    OutputType.F16: "cutlass::half_t",
    OutputType.F32: "float",
}
"""The C++ type of each output type."""

_FUNCTIONS: Final = {
    Activation.SILU: "cutlass::epilogue::thread::SiLu",
    Activation.GELU: "cutlass::epilogue::thread::GELU",  # with erf
    Activation.GELU_TANH: "cutlass::epilogue::thread::GELU_taylor",
    Activation.RELU: "cutlass::epilogue::thread::ReLu",
}


@dataclass(frozen=True)
class Step:
    """One operation on all elements, after those before it.

    Attributes:
        alias: The name of its type.
        operation: The C++ template that computes it, on fp32.
        output: The type of its result.
        children: Types of its operands.
        arguments: The arguments of its operands, then its own, as C++ initializers.
    """

    alias: str
    operation: str
    output: str
    children: tuple[str, ...]
    arguments: tuple[str, ...]

    @property
    def declaration(self) -> str:
        """The C++ declaration of its type."""
        inner = ", ".join((self.operation, self.output, *self.children))
        return f"using {self.alias} = Node<{inner}>;"

    @property
    def initializer(self) -> str:
        """The C++ declaration of its arguments, named like the type in lower case."""
        values = ", ".join(self.arguments)
        return f"{self.alias}::Arguments {self.alias.lower()}{{{values}}};"


def epilogue_steps(instance: Instance) -> tuple[Step, ...]:
    """Return the steps after scaling; the last one rounds to the element type of D."""
    kinds = ["Biased"]
    if instance.activation is not Activation.NONE:
        kinds.append("Activated")
    if instance.residual:
        kinds.append("Added")
    last = "float" if instance.quantized else CPP_OUTPUT[instance.output]
    out = [*["float"] * (len(kinds) - 1), last]
    inputs = ["Scaled", *kinds[:-1]]
    return tuple(
        _step(instance, kind, result, below)
        for kind, result, below in zip(kinds, out, inputs, strict=True)
    )


def _step(instance: Instance, kind: str, output: str, below: str) -> Step:
    value = below.lower()
    if kind == "Biased":
        arguments = ("{args.bias, 0.0f, {}}", value, "{}")
        return Step(kind, "cutlass::plus", output, ("PerColumn", below), arguments)
    if kind == "Activated":
        return Step(kind, _FUNCTIONS[instance.activation], output, (below,), (value, "{}"))
    source = f"fusion::Sm90SrcFetch<{CPP_OUTPUT[instance.output]}>"
    return Step(kind, "cutlass::plus", output, (source, below), ("{}", value, "{}"))
