"""A unit as a function of its weights and inputs, which can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, fx

from fpcompiler.errors import FpcompilerError, RunError
from fpcompiler.reconstruction.units import Unit

_NONE: Final[Mapping[str, Tensor]] = MappingProxyType({})


class UnitFunction:
    """The part of a graph that a unit is.

    Args:
        module: The graph.
        unit: Of this graph.
        device: Where it runs; constants are brought there.
        skipped: Functions that are not called: their first argument is their result.
        weights: Take the place of attributes of the module, other than the unit's own weights.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        unit: Unit,
        device: torch.device,
        skipped: frozenset[Callable[..., Any]],
        weights: Mapping[str, Tensor] = _NONE,
    ) -> None:
        self._unit = unit
        self._factors: list[Tensor] | None = None
        self._dtypes = [getattr(module, name).dtype for name in unit.weights]
        self._module = _Copier(module, device, weights, skipped).copy(unit, unit.outputs)
        reads = [node for node in unit.reads if node is not None]
        self._reads = _Copier(module, device, weights, skipped).copy(unit, reads)

    def __call__(self, weights: Sequence[Tensor], inputs: tuple[Any, ...]) -> Tensor:
        """Return the output; autograd goes through.

        Args:
            weights: In the order of the unit's, fp32; they are brought to the model's dtype.
            inputs: In the order of the unit's.

        Raises:
            RunError: If it cannot run.
        """
        return self.joined(self._run(self._module, weights, inputs))

    def reads(self, weights: Sequence[Tensor], inputs: tuple[Any, ...]) -> list[Tensor]:
        """Return what the weights are multiplied with, where ``unit.reads`` says it.

        Args:
            weights: As for a call.
            inputs: As for a call.

        Raises:
            RunError: If it cannot run.
        """
        with torch.no_grad():
            return self._run(self._reads, weights, inputs)

    def _run(
        self, module: fx.GraphModule, weights: Sequence[Tensor], inputs: tuple[Any, ...]
    ) -> list[Tensor]:
        own = [weight.to(dtype) for weight, dtype in zip(weights, self._dtypes, strict=True)]
        try:
            return list(module(*own, *inputs))
        except (torch.OutOfMemoryError, FpcompilerError):
            raise
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise RunError(f"unit {self._unit.name!r} cannot run on its own: {error}") from error

    def joined(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs as one tensor, of several each relative to its norm in the first call.

        Several streams (of text and of pictures, say) are equally important then, however many
        values each has.
        """
        if len(outputs) == 1:
            return outputs[0]
        if self._factors is None:
            mean = sum(out.numel() for out in outputs) / len(outputs)
            squares = [out.detach().float().square().sum() / mean for out in outputs]
            self._factors = [torch.where(s > 0, s, 1.0).rsqrt() for s in squares]
        pairs = zip(outputs, self._factors, strict=True)
        return torch.cat([out.float().flatten() * factor for out, factor in pairs])


class _Copier:
    """Copies nodes into a graph of their own, with the constants that they read."""

    def __init__(
        self,
        module: fx.GraphModule,
        device: torch.device,
        weights: Mapping[str, Tensor],
        skipped: frozenset[Callable[..., Any]],
    ) -> None:
        self._source = module
        self._device = device
        self._weights = weights
        self._skipped = skipped
        self._root = torch.nn.Module()
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}

    def copy(self, unit: Unit, outputs: Sequence[fx.Node]) -> fx.GraphModule:
        loads: dict[str, fx.Node] = {}
        for name in unit.weights:
            loads[name] = self._graph.placeholder(name)
        for node in unit.inputs:
            self._copies[node] = self._graph.placeholder(node.name)
        for node in self._source.graph.find_nodes(op="get_attr"):
            if str(node.target) in loads:
                self._copies[node] = loads[str(node.target)]
        for node in outputs:
            self._copy(node)
        self._graph.output(tuple(self._copies[node] for node in outputs))
        return fx.GraphModule(self._root, self._graph)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node in self._copies:
            return self._copies[node]
        if node.op == "get_attr":
            name = str(node.target)
            weights = self._weights
            tensor = weights[name] if name in weights else getattr(self._source, name)
            self._root.register_buffer(str(node.target), tensor.detach().to(self._device))
            self._copies[node] = self._graph.get_attr(str(node.target))
            return self._copies[node]
        for read in node.all_input_nodes:
            self._copy(read)
        first = node.args[0] if node.args else None
        if node.target in self._skipped and isinstance(first, fx.Node):
            self._copies[node] = self._copies[first]
            return self._copies[node]

        def moved(used: Any) -> Any:
            if isinstance(used, torch.device):
                return self._device
            return self._copies[used] if isinstance(used, fx.Node) else used

        args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), moved)
        assert callable(node.target)
        self._copies[node] = self._graph.call_function(node.target, args, dict(kwargs))
        return self._copies[node]
