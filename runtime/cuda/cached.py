"""Caches of eight bits that attention reads as they are: which steps of a plan unpack them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from fpcompiler.plan import Plan, Step
from fpcompiler.runtime.cuda.attention import CACHES, OPERATOR, CachedRows
from fpcompiler.runtime.operators import Function

_OPERANDS: Final = {f"{name}@token:f32": name for name in CACHES}
_ROWS: Final = slice(1, 3)


@dataclass(frozen=True)
class Cache:
    """How keys or values come from a cache.

    Attributes:
        unpack: The step that gives each code a byte, which it has already.
        dequantize: The step that makes values of codes.
        format: Of the codes.
    """

    unpack: int
    dequantize: int
    format: str


def caches_of(plan: Plan) -> dict[int, tuple[Cache, Cache]]:
    """Return the caches of keys and of values that only attention reads, by its step."""
    makers = {out: index for index, step in enumerate(plan.steps) for out in step.outs}
    uses: dict[str, int] = dict.fromkeys((o for o in plan.outputs if isinstance(o, str)), 2)
    for step in plan.steps:
        for name in step.uses():
            uses[name] = uses.get(name, 0) + 1
    found = {}
    for index, step in enumerate(plan.steps):
        if step.op == OPERATOR:
            pair = [_cache(plan, makers, uses, value) for value in step.args[_ROWS]]
            if len(pair) == 2 and pair[0] and pair[1]:
                found[index] = pair[0], pair[1]
    return found


def functions_of(cache: Cache) -> dict[int, Function]:
    """Return what runs the steps of a cache where a kernel reads its codes."""

    def unpack(packed: Tensor, bits: int, k: int) -> Tensor:
        return packed

    def dequantize(value: Sequence[Tensor], operand: str, dtype: Any) -> CachedRows:
        codes, scale = value
        return CachedRows(codes, scale, cache.format, dtype)

    return {cache.unpack: unpack, cache.dequantize: dequantize}


def _cache(plan: Plan, makers: dict[str, int], uses: dict[str, int], value: object) -> Cache | None:
    dequantize = _only(makers, uses, value)
    if dequantize is None or plan.steps[dequantize].op != "fpc.dequantize":
        return None
    parts, operand = plan.steps[dequantize].args[:2]
    if operand not in _OPERANDS or not isinstance(parts, list) or len(parts) != 2:
        return None
    unpack = _only(makers, uses, parts[0])
    return (
        None
        if unpack is None or not _is_unpack(plan.steps[unpack])
        else Cache(unpack, dequantize, _OPERANDS[str(operand)])
    )


def _only(makers: dict[str, int], uses: dict[str, int], value: object) -> int | None:
    """Return the step that makes a value, if that is read once."""
    name = value.get("v") if isinstance(value, dict) else None
    return makers.get(str(name)) if uses.get(str(name)) == 1 else None


def _is_unpack(step: Step) -> bool:
    return step.op == "fpc.unpack" and not step.kwargs and step.args[1] == 8
