"""A quantized program as it would run without quantization, for calibration.

Quantized values are passed through, so before any weight is stored as codes the graph computes what
the original model does. Stored weights are decoded: their layers then see a quantized prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch_mlir import ir

from fpcompiler.ir.program import Program
from fpcompiler.ir.raise_to_fx import Raiser
from fpcompiler.ir.types import quantized_type, tensor_type


def raise_without_quantization(
    program: Program, taps: Sequence[ir.Value]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Return the graph, and the nodes that compute some values of the program.

    Args:
        program: A program at stage ``quantized``.
        taps: Values to find again in the graph.

    Raises:
        IRError: If an operation cannot be executed.
    """
    with program.context():
        raiser = FloatRaiser(program)
        raiser.keep(taps)
        module = raiser.run()
        return module, [raiser.values[value] for value in taps]


class FloatRaiser(Raiser):
    """Passes quantized values through, and decodes stored weights."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.handlers["fpq.quantize"] = lambda op, args: args[0]
        self.handlers["fpq.encode"] = lambda op, args: args[0]
        self.handlers["fpq.dequantize"] = lambda op, args: args[0]
        self.handlers["fpq.fold"] = lambda op, args: args[0]  # fpq.linear divides
        self.handlers["fpq.assemble"] = self._decode
        self.handlers["fpq.linear"] = self._float_linear

    def _decode(self, op: ir.Operation, args: list[Any]) -> fx.Node:
        kind = quantized_type(op.results[0])
        assert kind is not None
        codes, *scales = [arg for arg in args if arg is not None]
        unpacked = self._call(
            torch.ops.fpc.unpack.default,
            (codes, kind.operand.format.storage_bits, kind.shape[-1]),
        )
        value = ([unpacked, *scales], str(kind.operand), torch.float32)
        return self._call(torch.ops.fpc.dequantize.default, value)

    def _float_linear(self, op: ir.Operation, args: list[Any]) -> fx.Node:
        x, weight, bias = args
        result = tensor_type(op.results[0])
        assert result is not None
        if op.operands[1].owner.name == "fpq.assemble":  # decoded, which gives fp32
            weight = self._call(torch.ops.aten.to.dtype, (weight, result.dtype))
        if op.operands[1].owner.name == "fpq.fold":
            x, weight = self._folded(x, weight, op.operands[1].owner.operands[1])
        return self._call(torch.ops.aten.linear.default, (x, weight, bias))

    def _folded(self, x: fx.Node, weight: fx.Node, powers: ir.Value) -> tuple[fx.Node, fx.Node]:
        """Divide the columns of a weight; fp16 has no room for that, so there the input."""
        kind, divisor = tensor_type(powers), self.values[powers]
        assert kind is not None
        if kind.dtype == torch.float16:
            return self._call(torch.ops.aten.div.Tensor, (x, divisor)), weight
        return x, self._call(torch.ops.aten.div.Tensor, (weight, divisor))
