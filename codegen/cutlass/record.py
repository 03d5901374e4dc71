"""Instances as JSON values, and back from files that nobody vouches for."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, Final

from fpcompiler.codegen.arch import ARCHS
from fpcompiler.codegen.container import NATIVE
from fpcompiler.codegen.cutlass.instance import Instance, Tile, tiles
from fpcompiler.codegen.cutlass.quantized import QuantizedOutput, why_not_on
from fpcompiler.codegen.kernel import refusing_descriptions
from fpcompiler.codegen.problem import Activation, BlockScale, OutputType, Rows
from fpcompiler.operand import Operand

__all__ = ["describe", "parse_instance"]

_ENUMS: Final = {"scale": BlockScale, "output": OutputType, "activation": Activation}


def describe(instance: Instance) -> dict[str, Any]:
    """Return an instance as JSON values."""
    values = asdict(instance)
    if instance.quantized is None:
        del values["quantized"]  # what was described before there were such stays the same
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
    found = _exactly({"quantized": None, **values} if type(values) is dict else values, Instance)
    quantized = None if found["quantized"] is None else _quantized(found["quantized"])
    enums = {name: kind(found[name]) for name, kind in _ENUMS.items()}
    instance = Instance(**{**found, **enums, "tile": _tile(found["tile"]), "quantized": quantized})
    if type(instance.residual) is not bool:
        raise TypeError("residual is no truth value")
    if quantized is not None:
        reason = why_not_on(instance.machine.collectives, quantized)
        if reason or instance.residual:
            raise ValueError(f"none quantizes its output so: {reason or 'it adds a residual'}")
    if not {instance.a, instance.b} <= set(NATIVE[instance.kind]):
        raise ValueError(f"{instance.kind} multiplies no {instance.a} by {instance.b}")
    scales = {kind.name: kind.blocks for kind in ARCHS[instance.arch].facts.kinds}
    wanted = "" if instance.scale is BlockScale.NONE else instance.scale.value
    if wanted not in scales[instance.kind]:
        raise ValueError(f"{instance.kind} on {instance.arch} takes no scales {wanted!r}")
    if not any(instance.tile in tiles(instance.arch, instance.kind, rows) for rows in Rows):
        raise ValueError(f"no kernel has the tile {instance.tile}")
    return instance


def _quantized(values: object) -> QuantizedOutput:
    found = _exactly(values, QuantizedOutput)
    if any(type(text) is not str for text in found.values()):
        raise TypeError("an output is described by texts")
    if str(Operand.parse(found["operand"])) != found["operand"]:
        raise ValueError("the operand is not as written")
    return QuantizedOutput(**found)


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


def _exactly(values: object, kind: type[Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    if type(values) is not dict or set(values) != names:
        raise TypeError(f"it needs {', '.join(sorted(names))}")
    return values
