"""Running a graph piece by piece over many batches, with what lies between kept on disk.

All batches go through one piece before the next piece starts, so that the statistics of a few
layers are in memory at a time, and each operation still runs once for each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, fx

from fpcompiler.errors import FpcompilerError, RunError

Environment = dict[str, Any]
"""Values of nodes by name: tensors and numbers."""

_NONE: Final[Mapping[str, Tensor]] = MappingProxyType({})


class Segments:
    """A graph cut into pieces.

    Args:
        module: The graph; nothing in it may be written to in place before its end.
        pieces: For each piece the nodes that are tapped in it. It ends with the last of them, or
            further on, where everything that crosses the cut is a tensor or a number. What an
            earlier piece computed is carried to the piece that taps it.
        device: Where it runs; weights are brought there when they are read.
        weights: Take the place of attributes of the module, by name. They may be changed between
            runs.
        skipped: Functions that are not called: their first argument is their result.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        pieces: Sequence[Sequence[fx.Node]],
        device: torch.device,
        *,
        weights: Mapping[str, Tensor] = _NONE,
        skipped: frozenset[Callable[..., Any]] = frozenset(),
    ) -> None:
        self._module = module
        self._device = device
        self._weights = weights
        self._skipped = skipped
        self._nodes = [node for node in module.graph.nodes if node.op != "output"]
        position = {node: index for index, node in enumerate(self._nodes)}
        self._position = position
        self._named = {node.name: node for node in self._nodes}
        self._lists = [node for node in self._nodes if _is_list(node)]
        self._last = {
            node: max((position.get(user, len(self._nodes)) for user in node.users), default=-1)
            for node in self._nodes
        }
        self._cuts = [0]
        for taps in pieces:
            last = max(position[node] for node in taps)
            self._cuts.append(max(self._cuts[-1], self._cut_after(last)))
        for start, taps in zip(self._cuts, pieces, strict=False):
            self._last |= {node: max(self._last[node], start) for node in taps}

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    def __len__(self) -> int:
        """Return the number of pieces."""
        return len(self._cuts) - 1

    def _cut_after(self, index: int) -> int:
        cut = index + 1
        while any(self._position[node] < cut <= self._last[node] for node in self._lists):
            cut += 1
        return cut

    def run(
        self, piece: int, environment: Environment, taps: Mapping[fx.Node, Callable[[Any], None]]
    ) -> Environment:
        """Run one piece for one batch.

        Args:
            piece: Its number.
            environment: What the piece before left, or for the first the inputs by name.
            taps: Are called with the values of the nodes that this piece was made for.

        Returns:
            The values that later pieces read.
        """
        start, stop = self._cuts[piece], self._cuts[piece + 1]
        values: dict[fx.Node, Any] = {
            self._named[name]: value for name, value in environment.items()
        }
        for node, tap in taps.items():
            if self._position[node] < start:
                tap(self._argument(node, values))
        with torch.no_grad():
            for index in range(start, stop):
                node = self._nodes[index]
                if node not in values:
                    values[node] = self._compute(node, values)
                if node in taps:
                    taps[node](values[node])
                for used in node.all_input_nodes:
                    if self._last[used] <= index:
                        values.pop(used, None)
        return {
            node.name: value
            for node, value in values.items()
            if self._last[node] >= stop and node.op != "get_attr"
        }

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self._weight(node)

        def argument(used: Any) -> Any:
            if isinstance(used, torch.device):
                return self._device
            return self._argument(used, values) if isinstance(used, fx.Node) else used

        args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), argument)
        assert callable(node.target)
        if node.target in self._skipped:
            return args[0]
        try:
            return node.target(*args, **kwargs)
        except FpcompilerError:
            raise  # it says what is wrong better
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise RunError(
                f"{node.meta.get('place', node.name)}: the model cannot run on the calibration "
                f"data: {error}. Compare the batch with the inputs that the model takes."
            ) from error

    def _argument(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        # Weights are read again in each piece: they are not carried from one to the next.
        return values[node] if node in values else self._weight(node)

    def _weight(self, node: fx.Node) -> Tensor:
        name = str(node.target)
        tensor = self._weights[name] if name in self._weights else getattr(self._module, name)
        assert isinstance(tensor, Tensor)
        return tensor.to(self._device)


def _is_list(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return len(returns) != 1 or str(returns[0].type).startswith("List")
