"""One calibration batch through a program without quantization, to compare programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, fx
from torch_mlir import ir

from fpcompiler.calibration.calibration import Calibration
from fpcompiler.calibration.float_graph import raise_without_quantization
from fpcompiler.ir.program import Program
from fpcompiler.streams import Environment, Segments


def run_once(
    calibration: Calibration, program: Program, values: Sequence[ir.Value], rows: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the first batch.

    Args:
        calibration: The data, and the device to run on.
        program: A program at stage ``quantized``.
        values: Values of the program, ``[..., K]``.
        rows: How many rows of each are wanted.

    Returns:
        The first rows of each value, ``[rows or less, K]``, and the results of the program.
    """
    module, nodes = raise_without_quantization(program, values)
    graph = list(module.graph.nodes)
    computed = [node for node in graph if node.op == "call_function" and not _writes(node)]
    found: dict[fx.Node, Tensor] = {}
    taps: dict[fx.Node, Callable[[Tensor], None]] = {
        node: partial(_keep, found, node, rows) for node in nodes
    }
    segments = Segments(module, [computed[-1:]], calibration.device)
    left = segments.run(0, _arguments(calibration, graph), taps)
    results = [left[item.name] for item in graph[-1].args[0] if _is_computed(item)]
    return [found[node] for node in nodes], [item for item in results if isinstance(item, Tensor)]


def _arguments(calibration: Calibration, graph: Sequence[fx.Node]) -> Environment:
    names = [node.name for node in graph if node.op == "placeholder"]
    batch = calibration.batches[0]
    pairs = zip(names, batch, strict=True)
    return {name: tensor.to(calibration.device) for name, tensor in pairs}


def _keep(found: dict[fx.Node, Tensor], node: fx.Node, rows: int, value: Tensor) -> None:
    found[node] = value.reshape(-1, value.shape[-1])[:rows].clone()


def _writes(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.copy_.default


def _is_computed(item: object) -> bool:
    return isinstance(item, fx.Node) and item.op == "call_function"
