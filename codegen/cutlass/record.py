"""Instances as JSON values, and back from files that nobody vouches for."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, Final

from fpcompiler.codegen.arch import ARCHS
from fpcompiler.codegen.container import NATIVE
from fpcompiler.codegen.cutlass.instance import Instance, Tile
from fpcompiler.codegen.problem import Activation, BlockScale, OutputType
from fpcompiler.errors import ArtifactError

__all__ = ["describe", "parse_instance"]

_ENUMS: Final = {"scale": BlockScale, "output": OutputType, "activation": Activation}
_SIZES: Final = range(1, 1025)


def describe(instance: Instance) -> dict[str, Any]:
    """Return an instance as JSON values."""
    values = asdict(instance)
    values["tile"]["cluster"] = list(instance.tile.cluster)
    return {**values, **{name: values[name].value for name in _ENUMS}}


def parse_instance(values: object) -> Instance:
    """Return the instance that :func:`describe` described.

    Every value is looked up or is a small number, so that no text of a file gets into a source.

    Raises:
        ArtifactError: If it is none.
    """
    try:
        return _instance(values)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{values!r:.300} describes no kernel of this version ({error}); compile the model "
            "again."
        ) from error


def _instance(values: object) -> Instance:
    found = _exactly(values, Instance)
    kind, arch = found["kind"], found["arch"]
    if arch not in ARCHS or not {found["a"], found["b"]} <= set(NATIVE[kind]):
        raise ValueError(f"{found['a']} x {found['b']} by {kind} on {arch}")
    if type(found["residual"]) is not bool:
        raise TypeError("residual is no truth value")
    enums = {name: kind(found[name]) for name, kind in _ENUMS.items()}
    return Instance(**{**found, **enums, "tile": _tile(found["tile"])})


def _tile(values: object) -> Tile:
    found = _exactly(values, Tile)
    cluster = found["cluster"]
    if type(cluster) is not list or len(cluster) != 2:
        raise TypeError("a cluster is two numbers")
    sizes = (found["m"], found["n"], found["k"], found["sms"], *cluster)
    if not all(type(size) is int and size in _SIZES for size in sizes):
        raise TypeError("the sizes of a tile are small positive numbers")
    if type(found["pingpong"]) is not bool:
        raise TypeError("pingpong is no truth value")
    return Tile(**{**found, "cluster": (cluster[0], cluster[1])})


def _exactly(values: object, kind: type[Instance] | type[Tile]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    if type(values) is not dict or set(values) != names:
        raise TypeError(f"it needs {', '.join(sorted(names))}")
    return values
