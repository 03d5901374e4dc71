"""Operations of ONNX one after the other, with constants that are stored once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fpcompiler.errors import ExportError, describe_layer

__all__ = ["Builder", "last_size"]


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
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
            value.const_value.name = name  # type: ignore[union-attr]
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """Return the value in another type."""
        return self.op("Cast", value, to=int(kind))

    def split_blocks(self, value: ir.Value, rank: int, k: int | None, width: int) -> ir.Value:
        """Return values ``[..., k]`` as ``[..., blocks, width]``, filled up with zeros."""
        if k is None:
            rest = self.op("Mod", self.op("Neg", self._length(value, rank)), self.integers([width]))
            pads = self.op("Concat", self.integers([0] * (2 * rank - 1)), rest, axis=0)
            value = self.op("Pad", value, pads)
        elif k % width:
            value = self.op("Pad", value, self.integers([0] * (2 * rank - 1) + [-k % width]))
        return self.op("Reshape", value, self.integers([0] * (rank - 1) + [-1, width]))

    def join_blocks(
        self, value: ir.Value, like: ir.Value, rank: int, k: int | None, width: int
    ) -> ir.Value:
        """Undo :meth:`split_blocks`, which was given ``like``."""
        joined = self.op("Reshape", value, self.integers([0] * (rank - 1) + [-1]))
        if k is not None and k % width == 0:
            return joined
        end = self._length(like, rank) if k is None else self.integers([k])
        return self.op("Slice", joined, self.integers([0]), end, self.integers([-1]))

    def _length(self, value: ir.Value, rank: int) -> ir.Value:
        """Return the size of the last axis, ``[1]``."""
        return self.op("Shape", value, start=rank - 1)


def last_size(value: ir.Value, layer: str) -> tuple[int, int | None]:
    """Return the rank of a value, and the size of its last axis if that does not vary.

    Raises:
        ExportError: If torch's exporter did not find out how many axes there are.
    """
    if value.shape is None:
        raise ExportError(
            f"{describe_layer(layer)}: torch's ONNX exporter does not know the rank of its input. "
            "Export to pt2, or skip the layer in the scheme."
        )
    last = value.shape[-1]
    return len(value.shape), last if isinstance(last, int) else None
