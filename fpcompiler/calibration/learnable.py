"""A quantized program as a graph whose weights can be exchanged and differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx
from torch_mlir import ir

from fpcompiler.calibration.float_graph import FloatRaiser
from fpcompiler.ir.locations import place_of
from fpcompiler.ir.program import Program
from fpcompiler.ir.types import quantized_type
from fpcompiler.reconstruction import fake_quantize


def raise_learnable(program: Program, weights: Mapping[ir.Operation, Tensor]) -> fx.GraphModule:
    """Return the graph with the original weights as attributes ``weight0``, ``weight1``, ...

    Other values that are quantized go through :func:`fpcompiler.reconstruction.fake_quantize`.

    Args:
        program: A program at stage ``quantized``.
        weights: The operations that quantize the weights, and the values before that.

    Raises:
        IRError: If an operation cannot be executed.
    """
    with program.context():
        return _LearnableRaiser(program, weights).run()


class _LearnableRaiser(FloatRaiser):
    def __init__(self, program: Program, weights: Mapping[ir.Operation, Tensor]) -> None:
        super().__init__(program)
        self._names = {op: f"weight{number}" for number, op in enumerate(weights)}
        for op, name in self._names.items():
            self.root.register_buffer(name, weights[op].detach())
        self.handlers["fpq.quantize"] = self._fake_quantize
        self.handlers["fpq.encode"] = self._fake_quantize

    def _fake_quantize(self, op: ir.Operation, args: list[Any]) -> fx.Node:
        if op in self._names:
            return self.graph.get_attr(self._names[op])
        kind = quantized_type(op.results[0])
        assert kind is not None
        scales = [arg for arg in args[1:] if arg is not None]
        return self._call(fake_quantize, (args[0], str(kind.operand), scales, place_of(op).layer))
