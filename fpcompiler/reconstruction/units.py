"""Units of reconstruction: weights whose roundings are learned together, found from the graph.

A unit is a block of the model, such as a transformer block (BRECQ, arXiv 2102.05426): the innermost
numbered module (``layers.3``, ``stages.0.blocks.1``) that a residual sum goes past, or one in a
list with such modules. A layer that is in none is a unit of its own. Names of models or classes
play no part.
"""

from __future__ import annotations

import heapq
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import fx

_SUMS: Final = frozenset({torch.ops.aten.add.Tensor})
_SAME: Final = frozenset(
    {
        torch.ops.aten.to.dtype,
        torch.ops.aten.clone.default,
        torch.ops.aten.contiguous.default,
        torch.ops.aten.reshape.default,
        torch.ops.aten.view.default,
        torch.ops.aten.transpose.int,
        torch.ops.aten.permute.default,
        torch.ops.aten.flatten.using_ints,
    }
)
"""What gives the values of its first argument, in another form."""
_LINEAR: Final = torch.ops.aten.linear.default
_NUMBERED: Final = re.compile(r"(^|[._])\d+$")


@dataclass(frozen=True)
class Unit:
    """Part of a graph that is reconstructed as a whole.

    Attributes:
        name: Path of the module, or of the layer.
        weights: Names of the attributes whose roundings are learned.
        nodes: Everything that depends on them up to the end of the unit, in order.
        inputs: What these read from elsewhere, constants left out.
        outputs: Those that are read elsewhere.
        reads: What each weight is multiplied with, if it is in one linear layer as it is.
    """

    name: str
    weights: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    reads: tuple[fx.Node | None, ...]


def find_units(graph: fx.Graph, weights: Collection[str]) -> list[Unit]:
    """Return the units of a graph, in program order.

    Units whose nodes interleave become one. A weight that layers of several units share is in none.

    Args:
        graph: Its nodes have the paths of their modules as ``meta["module"]``.
        weights: Names of the attributes whose roundings could be learned.
    """
    return _Finder(graph, weights).units()


class _Finder:
    def __init__(self, graph: fx.Graph, weights: Collection[str]) -> None:
        self._nodes = [node for node in graph.nodes if node.op != "output"]
        self._position = {node: index for index, node in enumerate(self._nodes)}
        self._ends = {m: i for i, node in enumerate(self._nodes) for m in _modules(_path(node))}
        self._constant = constants(graph)
        loads = [n for n in self._nodes if n.op == "get_attr" and str(n.target) in weights]
        self._layers = {load: self._layers_of(load) for load in loads}
        rounded = set(self._dependent(loads, len(self._nodes)))
        self._residual = _residual_modules(self._nodes, self._constant, rounded)
        self._lists = {_parent(module) for module in self._residual if _NUMBERED.search(module)}

    def units(self) -> list[Unit]:
        places = self._places()
        spans = sorted(
            (self._span(place, loads), place, loads) for place, loads in _inverted(places).items()
        )
        merged: list[tuple[int, str, list[fx.Node]]] = []
        for (first, last), place, loads in spans:
            if merged and first <= merged[-1][0]:
                end, name, before = merged[-1]
                merged[-1] = (max(end, last), name, before + loads)
            else:
                merged.append((last, place, loads))
        return [self._unit(name, last, loads) for last, name, loads in merged]

    def _layers_of(self, load: fx.Node) -> list[fx.Node]:
        """Return the nodes that multiply a weight with something computed."""
        found: list[fx.Node] = []
        for user in load.users:
            if user.op == "call_function":
                found += self._layers_of(user) if user in self._constant else [user]
        return found

    def _places(self) -> dict[fx.Node, str]:
        """Return for each weight the module that is its unit, or the layer; no shared weights."""
        paths = {load: [_path(node) for node in self._layers[load]] for load in self._layers}
        paths = {load: found for load, found in paths.items() if found}
        counts: dict[str, int] = {}
        for found in paths.values():
            for module in {module for path in found for module in _modules(path)}:
                counts[module] = counts.get(module, 0) + 1
        places = {}
        for load, found in paths.items():
            of_each = {self._place(path, counts) or path for path in found}
            if len(of_each) == 1:
                # Without a path, layers must not end in one unit by accident.
                places[load] = of_each.pop() or str(load.target)
        return places

    def _place(self, path: str, counts: Mapping[str, int]) -> str:
        """Return the innermost block around a layer; an empty text if there is none."""
        around = _modules(path)
        numbered = [m for m in around if _NUMBERED.search(m) and _parent(m) in self._lists]
        several = [m for m in around if m in self._residual and counts[m] > 1]
        return (numbered or several or [""])[-1]

    def _span(self, place: str, loads: Iterable[fx.Node]) -> tuple[int, int]:
        """Return the positions of the first layer and the last node of a unit."""
        calls = [sorted(self._position[node] for node in self._layers[load]) for load in loads]
        end = self._ends.get(place, -1)
        if min(map(len, calls)) == 1:
            # What reads a few of its weights once more, later, is not the block called again.
            last = max(call[0] for call in calls)
            again = [position for call in calls for position in call if position > last]
            calls = [[p for p in call if p <= last] for call in calls]
            end = min([end, *(position - 1 for position in again)])
        reached = self._dependent(loads, end)
        inside = [self._position[node] for node in reached if _is_in(_path(node), place)]
        return min(call[0] for call in calls), max([call[-1] for call in calls] + inside)

    def _dependent(self, loads: Iterable[fx.Node], last: int) -> list[fx.Node]:
        """Return the nodes up to a position that depend on some weights, in order."""
        waiting = sorted(self._position[load] for load in loads)
        reached, found = set(waiting), []
        while waiting:
            node = self._nodes[heapq.heappop(waiting)]
            if node.op == "call_function":
                found.append(node)
            for user in node.users:
                position = self._position.get(user, last + 1)
                if position <= last and position not in reached:
                    reached.add(position)
                    heapq.heappush(waiting, position)
        return found

    def _unit(self, name: str, last: int, loads: list[fx.Node]) -> Unit:
        own = dict.fromkeys(self._dependent(loads, last))
        # A list never leaves a unit, only what is taken out of it.
        taken = {user for node in own for user in node.users if user.target is operator.getitem}
        own |= dict.fromkeys(sorted(taken - own.keys(), key=self._position.__getitem__))
        inputs = {
            read: None
            for node in own
            for read in node.all_input_nodes
            if read not in own and read not in self._constant
        }
        outputs = [node for node in own if any(user not in own for user in node.users)]
        names = tuple(str(load.target) for load in loads)
        reads = tuple(map(_read_by, loads))
        return Unit(name, names, tuple(own), tuple(inputs), tuple(outputs), reads)


def _read_by(load: fx.Node) -> fx.Node | None:
    """Return what the one linear layer of a weight multiplies it with."""
    users = list(load.users)
    if len(users) != 1 or users[0].target is not _LINEAR or users[0].args[1] is not load:
        return None
    x = users[0].args[0]
    return x if isinstance(x, fx.Node) else None


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that do not depend on the inputs of a graph."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op == "call_function" and all(n in found for n in node.all_input_nodes)
        if node.op == "get_attr" or computed:
            found.add(node)
    return found


def _residual_modules(
    nodes: Iterable[fx.Node], constant: Collection[fx.Node], rounded: Collection[fx.Node]
) -> set[str]:
    """Return the modules that add something from outside to what their weights have computed."""
    found: set[str] = set()
    for node in nodes:
        operands = [n for n in node.all_input_nodes if n not in constant]
        if node.target not in _SUMS or len(operands) != 2:
            continue
        for computed, other in (operands, reversed(operands)):
            if computed in rounded:
                within = [set(_modules(_path(n))) for n in (node, *_sources(computed))]
                around = {module for n in _sources(other) for module in _modules(_path(n))}
                found |= set.intersection(*within) - around
    return found


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return where values come from, past what only changes their form or puts them together.

    Export makes ``x`` itself the result of ``x.float()`` where that changes nothing: a norm within
    a block would seem to be where the block's input comes from. A block of two streams may join
    them before it computes.
    """
    while node.target in _SAME and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.target is torch.ops.aten.cat.default:
        return [source for part in node.all_input_nodes for source in _sources(part)]
    return [node]


def _path(node: fx.Node) -> str:
    return str(node.meta.get("module", ""))


def _modules(path: str) -> list[str]:
    """Return the paths of all modules around one, itself included, from the outside."""
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _parent(module: str) -> str:
    return module.rpartition(".")[0]


def _is_in(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _inverted(places: Mapping[fx.Node, str]) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for load, place in places.items():
        found.setdefault(place, []).append(load)
    return found
