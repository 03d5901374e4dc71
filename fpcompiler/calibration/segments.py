"""Running a graph piece by piece over many batches, with what lies between kept on disk.

All batches go through one piece before the next piece starts, so that the statistics of a few
layers are in memory at a time, and each operation still runs once for each batch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

Environment = dict[str, Any]
"""Values of nodes by name: tensors and numbers."""

_SCALARS: Final = "scalars"


class Segments:
    """A graph cut into pieces.

    Args:
        module: The graph; nothing in it may be written to in place before its end.
        ends: The nodes after which it is cut, in order of the graph. A cut moves on to where
            everything that crosses it is a tensor or a number.
        device: Where it runs; weights are brought there when they are read.
    """

    def __init__(
        self, module: fx.GraphModule, ends: Sequence[fx.Node], device: torch.device
    ) -> None:
        self._module = module
        self._device = device
        self._nodes = [node for node in module.graph.nodes if node.op != "output"]
        position = {node: index for index, node in enumerate(self._nodes)}
        self._last = {
            node: max((position.get(user, len(self._nodes)) for user in node.users), default=-1)
            for node in self._nodes
        }
        self._cuts = [0, *(self._cut_after(position[node]) for node in ends)]

    def __len__(self) -> int:
        """Return the number of pieces."""
        return len(self._cuts) - 1

    def _cut_after(self, index: int) -> int:
        cut = index + 1
        while any(self._last[node] >= cut and _is_list(node) for node in self._nodes[:cut]):
            cut += 1
        return cut

    def run(
        self, piece: int, environment: Environment, taps: dict[fx.Node, Callable[[Tensor], None]]
    ) -> Environment:
        """Run one piece for one batch.

        Args:
            piece: Its number.
            environment: What the piece before left, or for the first the inputs by name.
            taps: Are called with the values of nodes of this piece.

        Returns:
            The values that later pieces read.
        """
        start, stop = self._cuts[piece], self._cuts[piece + 1]
        values: dict[fx.Node, Any] = {
            node: environment[node.name] for node in self._nodes if node.name in environment
        }
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

        def argument(used: fx.Node) -> Any:
            # Weights are read again in each piece: they are not carried from one to the next.
            return values[used] if used in values else self._weight(used)

        args = fx.map_arg(node.args, argument)
        kwargs = fx.map_arg(node.kwargs, argument)
        moved = {k: self._device if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        assert callable(node.target)
        return node.target(*args, **moved)

    def _weight(self, node: fx.Node) -> Tensor:
        tensor = getattr(self._module, str(node.target))
        assert isinstance(tensor, Tensor)
        return tensor.to(self._device)


def _is_list(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return len(returns) != 1 or str(returns[0].type).startswith("List")


class Spill:
    """Environments in a folder, one file for each batch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, piece: int, batch: int, environment: Environment) -> None:
        """Keep what a piece left for a batch."""
        folder = self._folder / f"piece-{piece:04}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.contiguous() for k, v in environment.items() if isinstance(v, Tensor)}
        scalars = {k: v for k, v in environment.items() if k not in tensors}
        path = folder / f"batch-{batch:05}.safetensors"
        unfinished = path.with_suffix(".tmp")
        # Values that share memory (views) must be written on their own.
        unique = {k: v.clone() for k, v in tensors.items()}
        save_file(unique, unfinished, metadata={_SCALARS: json.dumps(scalars)})
        os.replace(unfinished, path)

    def read(self, piece: int, batch: int, device: torch.device) -> Environment:
        """Return what :meth:`write` kept."""
        path = self._folder / f"piece-{piece:04}" / f"batch-{batch:05}.safetensors"
        with safe_open(path, framework="pt", device=str(device)) as file:
            values: Environment = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            values |= json.loads(file.metadata()[_SCALARS])
        return values

    def forget(self, piece: int) -> None:
        """Delete what a piece left."""
        shutil.rmtree(self._folder / f"piece-{piece:04}", ignore_errors=True)
