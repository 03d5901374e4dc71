"""Instances as JSON values, and back from files that nobody vouches for."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, Final

from fpcompiler.codegen.arch import ARCHS
from fpcompiler.codegen.container import NATIVE
from fpcompiler.codegen.cutlass.instance import Instance, Tile, tiles
from fpcompiler.codegen.kernel import refusing_descriptions
from fpcompiler.codegen.problem import Activation, BlockScale, OutputType, Rows

__all__ = ["describe", "parse_instance"]

_ENUMS: Final = {"scale": BlockScale, "output": OutputType, "activation": Activation}


def describe(instance: Instance) -> dict[str, Any]:
    """Return an instance as JSON values."""
    values = asdict(instance)
    values["tile"]["cluster"] = list(instance.tile.cluster)
    return {**values, **{name: values[name].value for name in _ENUMS}}


def parse_instance(values: object) -> Instance:
    """Return the instance that :func:`describe` described.

    Only what this version generates is accepted: no text of a file gets into a source.

    Raises:
        ArtifactError: If it is none.
    """
    with refusing_descriptions(values):
        return _instance(values)


def _instance(values: object) -> Instance:
    found = _exactly(values, Instance)
    enums = {name: kind(found[name]) for name, kind in _ENUMS.items()}
    instance = Instance(**{**found, **enums, "tile": _tile(found["tile"])})
    if type(instance.residual) is not bool:
        raise TypeError("residual is no truth value")
    if not {instance.a, instance.b} <= set(NATIVE[instance.kind]):
        raise ValueError(f"{instance.kind} multiplies no {instance.a} by {instance.b}")
    scales = {kind.name: kind.blocks for kind in ARCHS[instance.arch].facts.kinds}
    wanted = "" if instance.scale is BlockScale.NONE else instance.scale.value
    if wanted not in scales[instance.kind]:
        raise ValueError(f"{instance.kind} on {instance.arch} takes no scales {wanted!r}")
    if not any(instance.tile in tiles(instance.arch, instance.kind, rows) for rows in Rows):
        raise ValueError(f"no kernel has the tile {instance.tile}")
    return instance


def _tile(values: object) -> Tile:
    found = _exactly(values, Tile)
    m, n, k, sms = (found[name] for name in ("m", "n", "k", "sms"))
    cluster_m, cluster_n = found["cluster"]
    # True == 1, but it is no size.
    if any(type(size) is not int for size in (m, n, k, sms, cluster_m, cluster_n)):
        raise TypeError("the sizes of a tile are numbers")
    if type(found["pingpong"]) is not bool:
        raise TypeError("pingpong is no truth value")
    return Tile(m, n, k, (cluster_m, cluster_n), sms, found["pingpong"])


def _exactly(values: object, kind: type[Instance] | type[Tile]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    if type(values) is not dict or set(values) != names:
        raise TypeError(f"it needs {', '.join(sorted(names))}")
    return values
