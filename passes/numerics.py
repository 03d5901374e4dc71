"""What each pass did to the numbers: the program is executed after it and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fpcompiler.ir.program import Program
from fpcompiler.ir.raise_to_fx import raise_to_fx
from fpcompiler.numerics import metrics
from fpcompiler.runtime import fused
from fpcompiler.runtime.ops import without_residual


class Probe:
    """Runs a program on one batch after each pass and compares it with the captured program.

    Attributes:
        rows: One for each measured program: name, SQNR in dB of each output, SQNR of each layer.
    """

    def __init__(self, program: Program, inputs: Sequence[Tensor]) -> None:
        """Run the captured program.

        Args:
            program: The program as captured.
            inputs: The batch, one tensor for each argument of ``main``.
        """
        self._inputs = tuple(inputs)
        self._outputs, self._layers = _execute(program, self._inputs)
        self.rows: list[dict[str, Any]] = []

    def measure(self, program: Program, name: str) -> None:
        """Run a program and add a row."""
        outputs, layers = _execute(program, self._inputs)
        pairs = zip(self._outputs, outputs, strict=True)
        self.rows.append(
            {
                "after": name,
                "outputs_sqnr_db": [_sqnr(reference, value) for reference, value in pairs],
                "layers_sqnr_db": {
                    name: _layer_sqnr(self._layers[name].value, layer)
                    for name, layer in layers.items()
                    if name in self._layers and self._layers[name].value.shape == layer.value.shape
                },
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Return the rows with the shapes of the batch; an infinite SQNR is written as null."""
        return {
            "probe": [list(tensor.shape) for tensor in self._inputs],
            "note": "null: bit-equal to the captured program",
            "passes": self.rows,
        }


def _sqnr(reference: Tensor, value: Tensor) -> float | None:
    if torch.equal(reference, value):
        return None
    return round(metrics.sqnr_db(reference, value), 3)


class _Layer(NamedTuple):
    """The output of a layer, or the activation of it that is computed in the same operation."""

    value: Tensor
    activation: str


def _layer_sqnr(reference: Tensor, layer: _Layer) -> float | None:
    """Compare behind the activation, since the output itself is nowhere."""
    return _sqnr(fused.activate(reference, layer.activation), layer.value)


class _Recorder(fx.Interpreter):
    """Executes a graph and keeps the output of each layer (of its last call)."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.layers: dict[str, _Layer] = {}
        self._residual: Tensor | None = None

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if "layer" in node.meta and isinstance(result, Tensor):
            self.layers[node.meta["layer"]] = _Layer(result, node.meta.get("activation", ""))
        return result if self._residual is None else result + self._take_residual()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Leave out what a layer adds to its output, which is what is compared."""
        if target is torch.ops.fpc.linear.default:
            args, self._residual = without_residual(args)
        return super().call_function(target, tuple(args), kwargs)

    def _take_residual(self) -> Tensor | None:
        residual, self._residual = self._residual, None
        return residual


def _execute(
    program: Program, inputs: tuple[Tensor, ...]
) -> tuple[list[Tensor], dict[str, _Layer]]:
    """Run a program from its initial state, which is left unchanged."""
    module = raise_to_fx(program)
    for name, buffer in list(module.named_buffers()):
        if _is_written(module, name):
            setattr(module, name, buffer.clone())
    recorder = _Recorder(module)
    with torch.no_grad():
        outputs = recorder.run(*inputs)
    return [value for value in outputs if isinstance(value, Tensor)], recorder.layers


def _is_written(module: fx.GraphModule, name: str) -> bool:
    loads = [n for n in module.graph.nodes if n.op == "get_attr" and n.target == name]
    writes = (user.target is torch.ops.aten.copy_.default for n in loads for user in n.users)
    return any(writes)
