"""Quantized linear layers as steps of a plan: their arguments, and who reads what."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fpcompiler.operand import Operand
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime import fused
from fpcompiler.runtime.operators import QUANTIZERS
from fpcompiler.runtime.ops import LINEAR_STEP, LinearArguments

_OUTSIDE: Final = -1
_SEVERAL: Final = 2


class LayerArguments(NamedTuple):
    """The arguments of ``fpc.linear`` that are known when a program is loaded."""

    w: list[Tensor]
    bias: Tensor | None
    x_operand: Operand | None
    w_operand: Operand
    k: int
    dtype: torch.dtype
    name: str
    activation: str


def read_layer(step: Step, constants: Mapping[str, Tensor]) -> LayerArguments | str:
    """Return a layer's arguments, or why nothing can be prepared from them.

    Args:
        step: An ``fpc.linear``.
        constants: The constants of the plan by value name.
    """
    given = arguments_of(step)
    if given is None:
        return "its arguments are named, or not as many as it has"
    w = [constants[item["v"]] for item in given.w if item["v"] in constants]
    bias = None if given.bias is None else constants.get(given.bias["v"])
    if len(w) < len(given.w) or (given.bias is not None and bias is None):
        return "its weights or its bias are computed at each call"
    if given.activation and given.activation not in fused.ACTIVATIONS:
        return f"there is no activation {given.activation!r}"
    x_operand = Operand.parse(given.x_operand) if given.x_operand else None
    w_operand = Operand.parse(given.w_operand)
    dtype = getattr(torch, given.dtype["dtype"])
    return LayerArguments(
        w, bias, x_operand, w_operand, given.k, dtype, given.layer, given.activation
    )


def arguments_of(step: Step) -> LinearArguments | None:
    """Return the arguments of a layer as they stand in the plan; None if they are not in order."""
    most, optional = len(LinearArguments._fields), len(LinearArguments._field_defaults)
    if step.kwargs or not most - optional <= len(step.args) <= most:
        return None
    return LinearArguments(*step.args)


def weight_names(step: Step) -> tuple[str, ...]:
    """Return the values that are an ``fpc.linear``'s weights, scales and bias."""
    given = LinearArguments(*step.args)
    parts = [*given.w, *([] if given.bias is None else [given.bias])]
    return tuple(part["v"] for part in parts)


def shared_quantizers(plan: Plan, kinds: Mapping[int, Hashable]) -> dict[int, int]:
    """Return the quantizers whose results are read by known layers only, all in the same form.

    Such a quantizer can give its results in that form; of any other they stay codes and scales.

    Args:
        plan: The plan.
        kinds: The form in which a layer reads its input, by the index of its step.

    Returns:
        The index of one of the layers by that of the quantizer's step.
    """
    found = {}
    for index, readers in enumerate(readers_of(plan)):
        step = plan.steps[index]
        if step.op not in QUANTIZERS or step.kwargs or not readers:
            continue
        whole = all(i in kinds and _reads_whole(plan.steps[i], step) for i in readers)
        if whole and len({kinds[i] for i in readers}) == 1:
            found[index] = readers[0]
    return found


def shared_values(plan: Plan, kinds: Mapping[int, Hashable]) -> dict[int, int]:
    """Return the steps whose one result only known layers read, two or more, not quantized.

    Such a step can give its result as the layers read it.

    Args:
        plan: The plan.
        kinds: The form in which a layer reads its input, by the index of its step.

    Returns:
        The index of one of the layers by that of the step.
    """
    found = {}
    for index, readers in enumerate(readers_of(plan)):
        step = plan.steps[index]
        if step.op in (*QUANTIZERS, LINEAR_STEP) or len(step.outs) != 1 or len(readers) < _SEVERAL:
            continue
        plain = all(i in kinds and _reads_plain(plan.steps[i], step.outs[0]) for i in readers)
        if plain and len({kinds[i] for i in readers}) == 1:
            found[index] = readers[0]
    return found


def readers_of(plan: Plan) -> list[list[int]]:
    """Return the steps that read results of each step; -1 for the results of the plan itself."""
    makers = {out: index for index, step in enumerate(plan.steps) for out in step.outs}
    readers: list[list[int]] = [[] for _ in plan.steps]
    for index, step in enumerate(plan.steps):
        for maker in {makers[name] for name in step.uses() if name in makers}:
            readers[maker].append(index)
    outside = [out for out in plan.outputs if isinstance(out, str)]
    for name in [*outside, *(value for value, _ in plan.stores)]:
        if name in makers:
            readers[makers[name]].append(_OUTSIDE)
    return readers


def _reads_plain(step: Step, name: str) -> bool:
    """Return whether a layer reads a value as its input, as it is, and as nothing else."""
    given = LinearArguments(*step.args)
    return list(given.x) == [{"v": name}] and not given.x_operand and given.residual != {"v": name}


def _reads_whole(step: Step, quantizer: Step) -> bool:
    """Return whether a layer reads all results of a quantizer as its input."""
    outs = [{"v": name} for name in quantizer.outs]
    given = LinearArguments(*step.args)
    return list(given.x) == outs and given.x_operand == quantizer.args[-2]
