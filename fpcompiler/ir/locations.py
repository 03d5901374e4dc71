"""Locations: ``"linear_3"("layers.0.q_proj"("model.py":28:0))``.

The outer name is the node's name in the exported graph (it becomes the SSA name in dumps), the
inner one the path of the module that ran it, and the file location the user's own line.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch_mlir import ir


@dataclass(frozen=True)
class Place:
    """Where an operation comes from in the user's model; empty strings where it is not known."""

    name: str = ""
    layer: str = ""
    source: str = ""

    def __str__(self) -> str:
        """Return words for an error message."""
        where = f"layer {self.layer!r}" if self.layer else (self.name or "an operation")
        return f"{where} ({self.source})" if self.source else where


def module_path(node: torch.fx.Node) -> str:
    """Return the path of the innermost module that ran a node; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = re.sub(r"^L\['self'\]\.?", "", str(stack[-1][0])) if stack else ""
    # Nodes that export itself adds (runtime assertions) carry a made-up stack.
    return "" if path.startswith("_empty_nn_module_stack") else path


@lru_cache(maxsize=1024)
def short_path(path: str) -> str:
    """Return a path relative to the working directory or to where its package was imported from.

    Dumps must not depend on the machine they were made on.
    """
    roots = [Path.cwd(), *(Path(entry) for entry in sys.path if entry)]
    for root in sorted(roots, key=lambda entry: -len(str(entry))):
        if Path(path).is_relative_to(root):
            return str(Path(path).relative_to(root))
    return Path(path).name


def _user_frame(node: torch.fx.Node) -> tuple[str, int] | None:
    """Return the innermost frame outside torch: the line of the model that did this."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    own = [(path, int(line)) for path, line in frames if "/" in path and "/torch/" not in path]
    return own[-1] if own else None


def node_location(node: torch.fx.Node, context: ir.Context) -> ir.Location:
    """Return the location of a node of an exported graph."""
    frame = _user_frame(node)
    location = ir.Location.unknown(context=context)
    if frame:
        location = ir.Location.file(short_path(frame[0]), frame[1], 0, context=context)
    path = module_path(node)
    # Always two names, so that the inner one is the module path wherever there is an outer one.
    return ir.Location.name(node.name, ir.Location.name(path or "model", location, context=context))


def place_of(op: ir.Operation) -> Place:
    """Return where an operation comes from, as far as its location still says."""
    outer = op.location
    if not isinstance(outer, ir.NameLoc):
        return Place()
    inner = outer.child_loc
    if not isinstance(inner, ir.NameLoc):
        return Place(name=outer.name_str)
    source = inner.child_loc
    text = ""
    if isinstance(source, ir.FileLineColLoc):
        text = f"{source.filename}:{source.start_line}"
    layer = "" if inner.name_str == "model" else inner.name_str
    return Place(outer.name_str, layer, text)


def renamed(location: ir.Location, name: str) -> ir.Location:
    """Return a location with another outer name, by which dumps call the value."""
    inner = location.child_loc if isinstance(location, ir.NameLoc) else location
    return ir.Location.name(name, inner)
