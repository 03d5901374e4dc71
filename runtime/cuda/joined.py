"""Layers that read the same input, multiplied as one: q, k and v, or gate and up.

A kernel for few tokens takes hardly longer for all their rows than for those of one, since starting
and ending it is most of its time. Weights are put together when a model is loaded, so nothing is
held twice; the first layer of a call computes the results of all, and each takes its columns. An
input that is not quantized is brought into the kernels' form where it is made, for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpcompiler.operand import Granularity
from fpcompiler.plan import Plan, Step
from fpcompiler.runtime.cuda.form import CudaInput
from fpcompiler.runtime.cuda.layers import CudaLayer, CudaLinear, Gemm
from fpcompiler.runtime.layer_steps import LayerArguments, arguments_of
from fpcompiler.runtime.operators import Function


@dataclass(frozen=True, eq=False)
class CudaPart:
    """A layer that is multiplied with others; called with the arguments of ``fpc.linear``.

    Attributes:
        linear: All of them, their rows one behind the other.
        number: Of this group of layers in its program.
        first: The first of its own rows.
        outputs: How many they are.
    """

    linear: CudaLinear
    number: int
    first: int
    outputs: int

    def __call__(self, x: Sequence[CudaInput], *rest: Any) -> Tensor:
        """Return what the operator returns, a part of a larger tensor."""
        products = x[0].products
        if self.number not in products:
            products[self.number] = self.linear.multiply(x[0])
        return products[self.number][..., self.first : self.first + self.outputs]


@dataclass(frozen=True, eq=False)
class CudaValues:
    """A step whose result only layers read, all in the same form.

    Attributes:
        function: What computes it.
        linear: One of the layers.
    """

    function: Function
    linear: CudaLinear

    def __call__(self, *args: Any, **kwargs: Any) -> CudaInput:
        """Return the result as the kernels read it."""
        return self.linear.prepare_values(self.function(*args, **kwargs))


def joinable(
    plan: Plan,
    sources: Mapping[int, int],
    layers: Mapping[int, LayerArguments],
    kernels: Mapping[int, Mapping[str, Gemm]],
) -> Iterator[tuple[int, ...]]:
    """Yield the steps that can be multiplied as one, two or more each time.

    Args:
        plan: The plan.
        sources: What :func:`~fpcompiler.runtime.layer_steps.shared_quantizers` and
            :func:`~fpcompiler.runtime.layer_steps.shared_values` found: steps whose results are
            prepared inputs.
        layers: The layers that have kernels, by the index of their step.
        kernels: The kernels of each.
    """
    own = {name for index in sources for name in plan.steps[index].outs}
    outside = {out for out in plan.outputs if isinstance(out, str)}
    groups: dict[object, list[int]] = {}
    for index, layer in layers.items():
        step = plan.steps[index]
        inputs = tuple(name for name in _inputs(step) if name in own)
        alone = layer.activation or _is_added_to(step) or step.outs[0] in outside
        if inputs and not alone:
            kind = layer.x_operand, layer.w_operand, layer.k, layer.dtype, layer.bias is None
            by = tuple(sorted((use, gemm.library) for use, gemm in kernels[index].items()))
            groups.setdefault((inputs, kind, by), []).append(index)
    for group in groups.values():
        if len(group) > 1 and _same_outer([layers[index] for index in group]):
            yield tuple(group)


def join(layers: Sequence[LayerArguments]) -> LayerArguments:
    """Return one layer that computes the outputs of several, which :func:`joinable` found."""
    first = layers[0]
    shared = 1 if _is_of_tensor(first) else None
    w = [
        first.w[index] if index == shared else torch.cat([layer.w[index] for layer in layers])
        for index in range(len(first.w))
    ]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    names = ", ".join(layer.name for layer in layers)
    return first._replace(w=w, bias=torch.cat(biases) if biases else None, name=names)


def parts_of(
    linear: CudaLinear, number: int, layers: Sequence[LayerArguments]
) -> list[CudaLayer | CudaPart]:
    """Return what runs each of the layers whose rows ``linear`` has."""
    if len(layers) == 1:
        return [CudaLayer(linear)]
    sizes = [layer.w[0].shape[0] for layer in layers]
    firsts = itertools.accumulate(sizes, initial=0)
    return [CudaPart(linear, number, *place) for place in zip(firsts, sizes, strict=False)]


def _inputs(step: Step) -> tuple[str, ...]:
    given = arguments_of(step)
    return () if given is None else tuple(item["v"] for item in given.x if isinstance(item, dict))


def _is_added_to(step: Step) -> bool:
    given = arguments_of(step)
    return given is not None and given.residual is not None


def _is_of_tensor(layer: LayerArguments) -> bool:
    outer = layer.w_operand.outer
    return outer is not None and outer.granularity is Granularity.TENSOR


def _same_outer(layers: Sequence[LayerArguments]) -> bool:
    """Whether a scale of the whole weight is one number for all."""
    first = layers[0]
    return not _is_of_tensor(first) or all(torch.equal(x.w[1], first.w[1]) for x in layers)
