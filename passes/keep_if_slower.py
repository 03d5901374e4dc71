"""``keep-if-slower``: leave layers in high precision that quantizing would make slower on a GPU."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Final

from torch_mlir import ir

from fpcompiler.errors import PassError
from fpcompiler.ir.locations import place_of
from fpcompiler.ir.program import Program, Stage
from fpcompiler.ir.types import tensor_type
from fpcompiler.operand import Operand
from fpcompiler.passes.base import Pass, PassContext
from fpcompiler.passes.layers import KINDS, LAYER, keep, layer_of, name_layers, weight_of
from fpcompiler.passes.roles import mark_roles, role_of
from fpcompiler.runtime.costs import GPUS, MEASURED, LayerCall, Prediction, predict, source_of
from fpcompiler.scheme import Match, Scheme

ROWS: Final = "fpq.rows"
"""Attribute of a layer: the rows of activations (tokens) that it gets in the example call."""

KEPT: Final = "layers kept, slower quantized"
QUANTIZED: Final = "layers not slower quantized"
"""Statistics."""

_HALVES: Final = ("bf16", "f16")
_LINEAR: Final = "torch.aten.linear"
_ADDMM: Final = "torch.aten.addmm"
_PRODUCTS: Final = (_LINEAR, "torch.aten.mm", "torch.aten.matmul", _ADDMM)
"""Layers that are one product in bf16 too; of all but the first, weights are [K, N]."""


def mark_rows(program: Program, shapes: Mapping[str, Sequence[int]]) -> None:
    """Note the number of rows of each layer's activations, which the pass needs.

    Args:
        program: At stage ``captured``.
        shapes: Of values in the example call, by the names of nodes.
    """
    with program.context():
        i64 = ir.IntegerType.get_signless(64)
        for op in program.operations(*_PRODUCTS):
            shape = shapes.get(place_of(op).name)
            if shape is not None and LAYER in op.attributes:
                op.attributes[ROWS] = ir.IntegerAttr.get(i64, prod(shape[:-1]))


def needs_rows(pipeline: Sequence[Pass]) -> bool:
    """Return whether a pipeline reads what :func:`mark_rows` notes."""
    return any(isinstance(item, KeepIfSlower) for item in pipeline)


@dataclass(frozen=True)
class KeepIfSlower(Pass):
    """Keep layers that are predicted to be slower quantized than as a product of bf16.

    A layer is kept if on each of the GPUs it is slower with as many tokens as in the example call
    and, in a model that has a cache, with one token too. Quantizing inputs counts. Layers that read
    the same input are one product on a GPU, and are judged as one. Layers without a prediction,
    convolutions, and layers that are not in 16 bits, which would run slower still if they were
    kept, are quantized.

    Attributes:
        scheme: As for ``insert-quantize``, which must follow and leaves kept layers alone.
        gpus: Names of GPUs with commas.
    """

    name: ClassVar[str] = "keep-if-slower"
    requires: ClassVar[Stage] = Stage.NORMALIZED
    scheme: str = "w4a6"
    gpus: str = "sm_90a"

    def run(self, program: Program, context: PassContext) -> None:
        """Mark layers as kept."""
        gpus = _known(self.gpus)
        name_layers(program)
        mark_roles(program)
        cached = _has_state(program)
        found: Counter[tuple[str, str]] = Counter()
        for runs in _candidates(program, Scheme.parse(self.scheme)).values():
            judged = _judged(runs, gpus, cached)
            if isinstance(judged, str):
                context.count(judged)
            elif all(each.prediction.is_slower for each in judged):
                context.count(KEPT)
                found[f"{runs[0].n} x {runs[0].k}", _speeds(judged)] += 1
                for layer in runs:
                    keep(layer.op, layer.match.rule, _reason(judged, layer))
            else:
                context.count(QUANTIZED)
        if found:
            context.reports.append(_report(found, gpus))


@dataclass(frozen=True)
class _Layer:
    """One run of a layer that the scheme quantizes; rows are 0 where they are not known."""

    op: ir.Operation
    match: Match
    weight: Operand
    n: int
    k: int
    rows: int
    together: tuple[int, ...]


@dataclass(frozen=True)
class _Judged:
    gpu: str
    tokens: int
    prediction: Prediction


def _known(gpus: str) -> list[str]:
    names = gpus.split(",")
    for name in names:
        if name not in GPUS:
            raise PassError(
                f"{KeepIfSlower.name}: there are no times for {name!r}; there are for "
                f"{', '.join(GPUS)}."
            )
    return names


def _has_state(program: Program) -> bool:
    """Return whether a call writes a global: a cache."""
    return any("is_mutable" in op.operation.attributes for op in program.module.body.operations)


def _candidates(program: Program, scheme: Scheme) -> dict[str, list[_Layer]]:
    """Return the runs of the layers that a scheme quantizes, by name."""
    wanted: list[tuple[ir.Operation, str, Match, Operand]] = []
    together: dict[object, tuple[int, ...]] = {}
    for op in program.operations(*KINDS):
        name = layer_of(op)
        match = scheme.for_layer(name, role_of(op)) if name is not None else None
        if name is None or match is None or match.weight is None or KINDS[op.name].refuse(op):
            continue
        wanted.append((op, name, match, match.weight))
        group = _joined_by(op, match)
        together[group] = (*together.get(group, ()), _sizes(op)[0])
    found: dict[str, list[_Layer]] = {}
    for op, name, match, weight in wanted:
        rows = ir.IntegerAttr(op.attributes[ROWS]).value if ROWS in op.attributes else 0
        layer = _Layer(op, match, weight, *_sizes(op), rows, together[_joined_by(op, match)])
        found.setdefault(name, []).append(layer)
    return found


def _joined_by(op: ir.Operation, match: Match) -> object:
    """Return what layers agree in that a GPU multiplies as one."""
    with_bias = op.name == _ADDMM or any(
        tensor_type(value) is not None for value in op.operands[2:3]
    )
    x = op.operands[1 if op.name == _ADDMM else 0]
    return x, str(match.weight), str(match.activation), with_bias


def _sizes(op: ir.Operation) -> tuple[int, int]:
    """Return outputs and inputs of a layer."""
    weight = weight_of(op)
    kind = None if weight is None else tensor_type(weight)
    assert kind is not None
    first, second = (size or 0 for size in kind.shape[:2])
    return (first, second) if op.name == _LINEAR else (second, first)


def _judged(runs: Sequence[_Layer], gpus: Sequence[str], cached: bool) -> list[_Judged] | str:
    """Return what is predicted of a layer, each once, or why nothing is decided by it."""
    found = []
    for layer in runs:
        if layer.op.name not in _PRODUCTS:
            return "convolutions, not predicted"
        result = tensor_type(layer.op.results[0])
        if result is None or result.element not in _HALVES:
            return "layers not in 16 bits"
        if not layer.rows:
            return "layers whose tokens are not known"
        tokens = (layer.rows, 1) if cached and layer.rows != 1 else (layer.rows,)
        for gpu, m in itertools.product(gpus, tokens):
            operands = layer.weight, layer.match.activation
            prediction = predict(gpu, LayerCall(m, layer.n, layer.k, *operands, layer.together))
            if isinstance(prediction, str):
                return "layers without a prediction"
            found.append(_Judged(gpu, m, prediction))
    return found


def _speed(judged: _Judged) -> str:
    tokens = "1 token" if judged.tokens == 1 else f"{judged.tokens:,} tokens"
    return f"{judged.prediction.speed:.2f}x with {tokens} on {judged.gpu}"


def _speeds(judged: Sequence[_Judged]) -> str:
    """Return predicted speeds in words, each once."""
    return ", ".join(dict.fromkeys(map(_speed, judged)))


def _reason(judged: Sequence[_Judged], layer: _Layer) -> str:
    saved = 1 - layer.weight.bits_per_value(layer.k) / 16
    measured = all(each.gpu in MEASURED for each in judged)
    how = "predicted" if measured else "estimated, never measured"
    return (
        f"slower than bf16 if quantized: {_speeds(judged)} ({how}); keep_if_slower=False quantizes "
        f"it and saves {saved:.0%} of its memory"
    )


def _report(found: Mapping[tuple[str, str], int], gpus: Sequence[str]) -> str:
    """Return a table of the layers that are kept, those with the same sizes in one row."""
    rows = [f"| {count} | {size} | {speeds} |" for (size, speeds), count in found.items()]
    sources = [f"{gpu}: {source_of(gpu)}." for gpu in gpus]
    count = sum(found.values())
    who, they = ("1 layer stays", "it") if count == 1 else (f"{count} layers stay", "they")
    lines = [
        f"{who} in 16 bits, because {they} would be slower quantized:",
        "",
        "| layers | size | times as fast as in bf16 |",
        "| ---: | --- | --- |",
        *rows,
        "",
        *sources,
        "Quantized they would take less memory: keep_if_slower=False, or --no-keep-if-slower.",
        "",
    ]
    return "\n".join(lines)
