"""A walk as a file, to learn on a machine that has a GPU but not the compiler."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import fx

import fpcompiler.runtime.ops  # noqa: F401  (registers the fpc:: operators)
from fpcompiler.errors import IRError
from fpcompiler.reconstruction.fake_quantize import fake_quantize
from fpcompiler.reconstruction.walk import Settings, Walk

_PLAIN: Final = (operator, math)
"""Modules with functions of numbers, which sizes are computed with."""


@dataclass(frozen=True)
class _Ref:
    """A node, as an argument."""

    name: str


@dataclass(frozen=True)
class _Row:
    """A node."""

    op: str
    name: str
    target: str
    args: Any
    kwargs: Any
    module: str
    place: str


def save_walk(walk: Walk, path: str | os.PathLike[str]) -> None:
    """Write everything that a walk needs to one file.

    Raises:
        IRError: If the graph calls a function that has no name in a file.
    """
    job = {
        "rows": [_row(node) for node in walk.module.graph.nodes],
        "tensors": {name: tensor.cpu() for name, tensor in walk.module.named_buffers()},
        "rounding": dict(walk.rounding),
        "batches": [tuple(tensor.cpu() for tensor in batch) for batch in walk.batches],
        "settings": replace(walk.settings, device=torch.device("cpu")),
    }
    unfinished = Path(f"{path}.tmp")
    torch.save(job, unfinished)
    os.replace(unfinished, path)


def load_walk(
    path: str | os.PathLike[str], folder: Path, device: str | torch.device = "cuda"
) -> Walk:
    """Return the walk of a file. Like any pickle the file can run code: load only your own.

    The results appear in ``folder / "results"``. Put into the folder of the run that wrote the
    file, they are what that run goes on with.

    Args:
        path: Of the file.
        folder: For results, and what is needed to go on.
        device: Where to run.
    """
    job = torch.load(path, map_location="cpu", weights_only=False)
    settings: Settings = replace(job["settings"], device=torch.device(device))
    root = torch.nn.Module()
    for name, tensor in job["tensors"].items():
        root.register_buffer(name, tensor)
    module = fx.GraphModule(root, _graph(job["rows"]))
    return Walk(module, job["rounding"], job["batches"], folder, settings)


def _row(node: fx.Node) -> _Row:
    args, kwargs = _encoded((node.args, node.kwargs))
    meta = node.meta
    return _Row(
        node.op, node.name, _name_of(node), args, kwargs,
        str(meta.get("module", "")), str(meta.get("place", "")),
    )  # fmt: skip


def _encoded(value: Any) -> Any:
    """Return an argument with references for nodes, and lists and dicts that are no longer fx's."""
    if isinstance(value, fx.Node):
        return _Ref(value.name)
    if isinstance(value, tuple):
        return tuple(map(_encoded, value))
    if isinstance(value, list):
        return list(map(_encoded, value))
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    return value


def _name_of(node: fx.Node) -> str:
    if not callable(node.target) or isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    if node.target is fake_quantize:
        return fake_quantize.__name__
    name = getattr(node.target, "__name__", "")
    for place in _PLAIN:
        if getattr(place, name, None) is node.target:
            return f"{place.__name__}.{name}"
    raise IRError(f"{node.meta.get('place', node.name)}: {node.target} cannot be saved in a job.")


def _function(name: str) -> Callable[..., Any]:
    if name == fake_quantize.__name__:
        return fake_quantize
    first, *rest = name.split(".")
    plain = {place.__name__: place for place in _PLAIN}
    found: Any = plain.get(first) or getattr(torch.ops, first)
    for part in rest:
        found = getattr(found, part)
    assert callable(found)
    return found  # type: ignore[no-any-return]


def _graph(rows: list[_Row]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def node_of(value: Any) -> Any:
        if isinstance(value, _Ref):
            return nodes[value.name]
        if isinstance(value, list | tuple):
            return type(value)(node_of(item) for item in value)
        if isinstance(value, dict):
            return {key: node_of(item) for key, item in value.items()}
        return value

    for row in rows:
        target = _function(row.target) if row.op == "call_function" else row.target
        node = graph.create_node(
            row.op, target, tuple(node_of(row.args)), node_of(row.kwargs), name=row.name
        )
        node.meta |= {"module": row.module, "place": row.place}
        nodes[row.name] = node
    return graph
