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

from fpcompiler.errors import RunError

Environment = dict[str, Any]
"""Values of nodes by name: tensors and numbers."""

_SCALARS: Final = "scalars"
_STRIDES: Final = "strides"


class Segments:
    """A graph cut into pieces.

    Args:
        module: The graph; nothing in it may be written to in place before its end.
        pieces: For each piece the nodes that are tapped in it. It ends with the last of them, or
            further on, where everything that crosses the cut is a tensor or a number. What an
            earlier piece computed is carried to the piece that taps it.
        device: Where it runs; weights are brought there when they are read.
    """

    def __init__(
        self, module: fx.GraphModule, pieces: Sequence[Sequence[fx.Node]], device: torch.device
    ) -> None:
        self._module = module
        self._device = device
        self._nodes = [node for node in module.graph.nodes if node.op != "output"]
        position = {node: index for index, node in enumerate(self._nodes)}
        self._position = position
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
            taps: Are called with the values of the nodes that this piece was made for.

        Returns:
            The values that later pieces read.
        """
        start, stop = self._cuts[piece], self._cuts[piece + 1]
        values: dict[fx.Node, Any] = {
            node: environment[node.name] for node in self._nodes if node.name in environment
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
        try:
            return node.target(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise RunError(
                f"{node.meta.get('place', node.name)}: the model cannot run on the calibration "
                f"data: {error}. Compare the batch with the inputs that the model takes."
            ) from error

    def _argument(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        # Weights are read again in each piece: they are not carried from one to the next.
        return values[node] if node in values else self._weight(node)

    def _weight(self, node: fx.Node) -> Tensor:
        tensor = getattr(self._module, str(node.target))
        assert isinstance(tensor, Tensor)
        return tensor.to(self._device)


def _is_list(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return len(returns) != 1 or str(returns[0].type).startswith("List")


def _laid_out(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """Return a copy with the strides that a value had: the last bits of products depend on them."""
    empty = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return empty.copy_(tensor)


class Spill:
    """Environments in a folder, one file for each batch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, piece: int, batch: int, environment: Environment) -> None:
        """Keep what a piece left for a batch."""
        folder = self._piece(piece)
        folder.mkdir(parents=True, exist_ok=True)
        # Cloned, because values that share memory (views) must be written on their own.
        tensors = {k: v.clone() for k, v in environment.items() if isinstance(v, Tensor)}
        scalars = {k: v for k, v in environment.items() if k not in tensors}
        strides = {k: v.stride() for k, v in tensors.items()}
        path = folder / f"batch-{batch:05}.safetensors"
        unfinished = path.with_suffix(".tmp")
        metadata = {_SCALARS: json.dumps(scalars), _STRIDES: json.dumps(strides)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, unfinished, metadata=metadata)
        os.replace(unfinished, path)

    def read(self, piece: int, batch: int, device: torch.device) -> Environment:
        """Return what :meth:`write` kept."""
        path = self._piece(piece) / f"batch-{batch:05}.safetensors"
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata()
            strides = json.loads(metadata[_STRIDES])
            values: Environment = {
                key: _laid_out(file.get_tensor(key), stride) for key, stride in strides.items()
            }
            values |= json.loads(metadata[_SCALARS])
        return values

    def forget(self, piece: int) -> None:
        """Delete what a piece left."""
        shutil.rmtree(self._piece(piece), ignore_errors=True)

    def forget_all_but(self, piece: int) -> None:
        """Delete what other pieces left, in a run that was killed."""
        for folder in self._folder.glob("piece-*"):
            if folder != self._piece(piece):
                shutil.rmtree(folder)

    def _piece(self, piece: int) -> Path:
        return self._folder / f"piece-{piece:04}"
