"""Which layers read the same input: what is decided about that input is decided for all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch_mlir import ir

from fpcompiler.ir.program import Program
from fpcompiler.ir.torch_ops import text_of
from fpcompiler.ir.types import quantized_type, tensor_type


@dataclass(frozen=True)
class Group:
    """Layers that share one input, such as q, k and v.

    Attributes:
        name: The name of the first layer; ``LAYER@2`` for the second group that starts with it,
            where the model calls a layer twice.
        x: The input before it is quantized, ``[..., K]``.
        quantize: The operation that quantizes it, or None where it stays as it is.
        layers: The ``fpq.linear`` operations, in program order.
    """

    name: str
    x: ir.Value
    quantize: ir.Operation | None
    layers: tuple[ir.Operation, ...]

    @property
    def k(self) -> int:
        """The length of the contracted axis."""
        kind = tensor_type(self.x)
        assert kind is not None
        assert kind.shape[-1] is not None
        return kind.shape[-1]

    @property
    def weights(self) -> int:
        """How many weights the layers have: what work on the group grows with."""
        outputs = [quantized_type(op.operands[1]) for op in self.layers]
        return self.k * sum(kind.shape[0] or 0 for kind in outputs if kind is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers."""
        return tuple(text_of(op.attributes["layer"]) for op in self.layers)


def input_groups(program: Program) -> list[Group]:
    """Return the groups of a program at stage ``quantized``, in program order."""
    found: dict[ir.Value, list[ir.Operation]] = {}
    for op in program.operations("fpq.linear"):
        found.setdefault(op.operands[0], []).append(op)
    names: Counter[str] = Counter()
    groups = []
    for value, layers in found.items():
        layer = text_of(layers[0].attributes["layer"])
        names[layer] += 1
        name = layer if names[layer] == 1 else f"{layer}@{names[layer]}"
        groups.append(_group(name, value, layers))
    return groups


def _group(name: str, value: ir.Value, layers: list[ir.Operation]) -> Group:
    if quantized_type(value) is None:
        return Group(name, value, None, tuple(layers))
    quantize = value.owner.operation
    return Group(name, quantize.operands[0], quantize, tuple(layers))
