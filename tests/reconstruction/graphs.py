"""Graphs to learn the roundings of: of programs, and made by hand of residual blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fpcompiler.calibration import input_groups, raise_learnable
from fpcompiler.numerics import dequantize, quantize, unpack
from fpcompiler.numerics.adaround import RoundOptions
from fpcompiler.operand import Operand
from fpcompiler.passes.weights import OpenWeights
from fpcompiler.reconstruction import Rounding, Settings, Unit, Walk, fake_quantize
from fpcompiler.streams import Result
from tests.calibration.runs import CPU, program_for, silent
from tests.models import normal
from tests.numerics.adaround.problems import correlated

aten = torch.ops.aten

WEIGHT = Operand.parse("f4E2M1FN@row:f32")
ACTIVATION = "f6E2M3FN@token:f32"
WIDTH = 16


def learnable(captured: Any, scheme: str = "w4a6,skip=none") -> tuple[fx.GraphModule, list[str]]:
    """Return the graph of a captured program, and the layers of ``weight0``, ``weight1``, ..."""
    program = program_for(captured, scheme)
    with program.context():
        weights = OpenWeights(program, input_groups(program))
        every = weights.every()
        return (
            raise_learnable(program, {w.op: weights.value(w) for w in every}),
            [weight.layer for weight in every],
        )


class Builder:
    """Builds a graph by hand."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.weights: list[str] = []

    def input(self, name: str = "x") -> fx.Node:
        return self.graph.placeholder(name)

    def call(self, module: str, function: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(function, args)
        node.meta |= {"module": module, "place": f"layer {module!r}"}
        return node

    def linear(self, module: str, x: fx.Node, weight: Tensor, operand: str = ACTIVATION) -> fx.Node:
        """Quantize the input if an operand is given, and multiply with a weight to round."""
        name = f"weight{len(self.weights)}"
        self.weights.append(name)
        self.root.register_buffer(name, weight)
        if operand:
            x = self.call(module, fake_quantize, x, operand, [], module)
        return self.call(module, aten.linear.default, x, self.graph.get_attr(name))

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule(self.root, self.graph)


def residual_blocks(count: int = 2, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """Return ``x + down(relu(up(x)))``, that often, and a head; the inputs are ``[T, WIDTH]``."""
    build = Builder()
    x = build.input()
    for number in range(count):
        up, down = (normal(*shape, seed=2 * number + i) / 4 for i, shape in enumerate(_SHAPES))
        name = f"blocks.{number}"
        y = build.call(name, aten.relu.default, build.linear(f"{name}.up", x, up.to(dtype)))
        y = build.linear(f"{name}.down", y, down.to(dtype))
        x = build.call(name, aten.add.Tensor, x, y)
    head = build.linear("head", x, normal(4, WIDTH, seed=90).to(dtype))
    return build.module(head)


_SHAPES = ((2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH))


def to_nearest(module: fx.GraphModule, operand: Operand = WEIGHT) -> dict[str, Rounding]:
    """Return how each weight of a graph is rounded: with the scales of round-to-nearest."""
    names = [name for name, _ in module.named_buffers() if name.startswith("weight")]
    return {
        name: Rounding(name, operand, quantize(getattr(module, name), operand)[1]) for name in names
    }


def tokens(count: int = 5, each: int = 24, dtype: torch.dtype = torch.float32) -> list[tuple]:
    """Return batches for :func:`residual_blocks`."""
    return [(correlated(each, WIDTH, seed=10 * i).to(dtype),) for i in range(count)]


def settings(iterations: int = 40, **changes: Any) -> Settings:
    """Return settings for a few iterations."""
    changes = {"device": CPU, "max_memory": 1 << 30} | changes
    options = changes.pop("options", RoundOptions(iterations=iterations))
    return Settings(options, **changes)


def walk_of(
    folder: Path,
    module: fx.GraphModule | None = None,
    batches: Sequence[tuple] = (),
    **changes: Any,
) -> Walk:
    """Return a walk, by default of residual blocks."""
    module = module or residual_blocks()
    given = batches or tokens()
    return Walk(module, to_nearest(module), given, folder, settings(**changes))


def run(walk: Walk) -> dict[str, Result]:
    """Run a walk to its end."""
    return walk.run(silent, "walk")


def values_of(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """Return the value of every node that computes something."""
    found: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            found[node] = super().run_node(node)
            return found[node]

    with torch.no_grad():
        Recorder(module).run(*inputs)
    return found


def learned(unit: Unit, result: Result, rounding: dict[str, Rounding], k: dict[str, int]) -> Any:
    """Return the values of the weights of a unit with learned codes, by name."""
    found = {}
    for index, name in enumerate(unit.weights):
        operand = rounding[name].operand
        codes = unpack(result[f"codes.{index}"], operand.format.storage_bits, k[name])
        found[name] = dequantize(codes, rounding[name].scales, operand)
    return found
