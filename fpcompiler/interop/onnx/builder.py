"""Operations of ONNX one after the other, with constants that are stored once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from fpcompiler.errors import ExportError, describe_layer

__all__ = ["Builder", "last_size"]

_LAST: Final = -1


class Builder:
    """Makes the operations that take the place of one symbol.

    Args:
        graph: The graph; gets the constants.
        layer: The layer that the operations belong to.
        place: What the names of the operations begin with.
    """

    def __init__(self, graph: ir.Graph, layer: str, place: str) -> None:
        self._graph, self.layer, self._place = graph, layer, place
        self.nodes: list[ir.Node] = []
        """The operations so far."""

    def op(self, name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Return the result of an operation."""
        node = ir.node(name, inputs, attributes, num_outputs=1)
        node.name = f"{self._place}/{name}_{len(self.nodes)}"
        node.outputs[0].name = node.name
        self.nodes.append(node)
        return node.outputs[0]

    def number(self, value: float, like: type[np.generic] = np.float32) -> ir.Value:
        """Return a constant without axes."""
        # The sign of zero and all bits count, and a name must be one number's only.
        array = np.asarray(value, dtype=like)
        return self._constant(f"{array.dtype}_{array.item()!r}", array)

    def integers(self, values: Sequence[int]) -> ir.Value:
        """Return int64 constants, one axis: a shape or axes."""
        text = "_".join(map(str, values))
        return self._constant(f"int64s_{text}", np.asarray(values, dtype=np.int64))

    def table(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """Return a constant that is known by its name."""
        return self._constant(name, array)

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        return self.initializer(f"fpc.{name}", ir.tensor(array))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Return the constant of a name, which is made if there is none."""
        if name not in self._graph.initializers:
            kind = ir.TensorType(tensor.dtype)
            value = ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor)
            value.const_value.name = name  # type: ignore[union-attr]
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """Return the value in another type."""
        return self.op("Cast", value, to=int(kind))

    def split_blocks(self, value: ir.Value, rank: int, k: int, width: int) -> ir.Value:
        """Return values ``[..., k]`` as ``[..., blocks, width]``, filled up with zeros."""
        blocks, rest = -(-k // width), -k % width
        if rest:
            pads = [0] * (2 * rank - 1) + [rest]
            value = self.op("Pad", value, self.integers(pads))
        return self.op("Reshape", value, self.integers([0] * (rank - 1) + [blocks, width]))

    def join_blocks(self, value: ir.Value, rank: int, k: int, width: int) -> ir.Value:
        """Undo :meth:`split_blocks`; ``rank`` is that of the result."""
        blocks = -(-k // width)
        value = self.op("Reshape", value, self.integers([0] * (rank - 1) + [blocks * width]))
        if blocks * width == k:
            return value
        ends = self.integers([0]), self.integers([k]), self.integers([_LAST])
        return self.op("Slice", value, *ends)


def last_size(value: ir.Value, layer: str) -> tuple[int, int]:
    """Return the rank of a value and the size of its last axis.

    Raises:
        ExportError: If it is not known.
    """
    shape = value.shape
    if shape is None or not isinstance(shape[-1], int):
        raise ExportError(
            f"{describe_layer(layer)}: its input has the shape {shape}, and ONNX needs to know how "
            "many channels are quantized. Compile the model with that size fixed (dynamic=)."
        )
    return len(shape), shape[-1]
