"""The search for layers that share an input: formats and scales of all of them at once.

What can be searched depends on the levels of the operands. An input with one static scale and
weights of one operand with scales per row are searched together (:mod:`.layer`,
:mod:`.faithful`). Otherwise the scales of the input are computed at each call, and only its format
is chosen; scales of blocks of the weights are chosen by the error that they make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.given import quantize_with
from fpcompiler.numerics.gptq import output_error
from fpcompiler.numerics.scaling import dequantize, quantize
from fpcompiler.numerics.search.block_scales import search_block_scales
from fpcompiler.numerics.search.layer import search_layer
from fpcompiler.numerics.search.result import SearchResult
from fpcompiler.operand import Granularity, Operand


class LayerSearch(Protocol):
    """Like :func:`fpcompiler.numerics.search.search_layer`."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        weight_formats: Sequence[FloatSpec],
        activation_formats: Sequence[FloatSpec] = (),
        *,
        fisher: Tensor | None = None,
        layer: str = "",
    ) -> SearchResult:
        """Search one layer."""


@dataclass(frozen=True)
class Decision:
    """What was found for layers that share an input.

    Attributes:
        weights: For each weight its operand and its scales, in the form of ``quantize``.
        activation: The operand of the input; None if it stays as it is.
        activation_scale: fp32 of one value where the input has a static scale, or None.
        loss: Mean squared error of the outputs on the calibration data, all layers together.
        rtn_loss: The same with the operands as they were given, rounded to nearest.
    """

    weights: tuple[tuple[Operand, tuple[Tensor, ...]], ...]
    activation: Operand | None
    activation_scale: Tensor | None
    loss: float
    rtn_loss: float


def search_shared(
    x: Tensor,
    gram: Tensor,
    weights: Sequence[Tensor],
    weight_operands: Sequence[Sequence[Operand]],
    activations: Sequence[Operand],
    search: LayerSearch = search_layer,
    *,
    fisher: Sequence[Tensor] | None = None,
    layer: str = "",
) -> Decision:
    """Choose formats and scales.

    With :func:`search_layer` the loss is never more than that of rounding to nearest. With the
    published search it can be, where an input with one scale and scales per row meet.

    Args:
        x: Calibration inputs ``[T, K]``.
        gram: The sum of ``x^T x`` over all calibration data, ``[K, K]``.
        weights: One or more ``[N, K]``.
        weight_operands: Candidates for each weight, which differ in their format only; the first
            is the given one.
        activations: The same for the input; none if it stays as it is.
        search: Searches an input with one scale and weights with scales per row.
        fisher: For each weight, weights ``[T, N]`` of the squared errors of its outputs; by default
            1. Scales of blocks are chosen without them: a sum of ``x^T x`` for each row would be
            needed.
        layer: Named in errors.

    Raises:
        NumericsError: If tensors do not fit, or hold NaN or infinity.
    """
    wide = x.float()
    search = partial(search, layer=layer)
    given = [operands[0] for operands in weight_operands]
    before = _rounded(weights, given, layer)
    rtn = _loss(wide, weights, before, activations[0] if activations else None, fisher, layer)
    if _is_static(activations) and _is_per_row(given):
        found = _jointly(wide, weights, weight_operands[0], activations, search, fisher)
    else:
        found = _apart(wide, gram, weights, weight_operands, activations, search, fisher, layer)
        if found.loss > rtn:  # weights alone are better, but not with the input as it is rounded
            found = _nearest(weights, given, activations, rtn)
    return replace(found, rtn_loss=rtn)


def _is_static(activations: Sequence[Operand]) -> bool:
    outer = activations[0].outer if activations else None
    if outer is None or activations[0].block is not None:
        return False
    return outer.granularity is Granularity.TENSOR


def _is_per_row(given: Sequence[Operand]) -> bool:
    outer = given[0].outer
    same = all(operand == given[0] for operand in given)
    rows = outer is not None and outer.granularity is Granularity.ROW
    return same and rows and given[0].block is None


def _jointly(
    x: Tensor,
    weights: Sequence[Tensor],
    weight_operands: Sequence[Operand],
    activations: Sequence[Operand],
    search: LayerSearch,
    fisher: Sequence[Tensor] | None,
) -> Decision:
    result = search(
        x,
        torch.cat([weight.float() for weight in weights]),
        [o.format for o in weight_operands],
        [o.format for o in activations],
        fisher=None if fisher is None else torch.cat(list(fisher), dim=1),
    )
    assert result.activation is not None
    operand = replace(weight_operands[0], format=result.weight.spec)
    scales = torch.split(result.weight.scale, [len(weight) for weight in weights])
    return Decision(
        tuple((operand, (scale.contiguous(),)) for scale in scales),
        replace(activations[0], format=result.activation.spec),
        result.activation.scale,
        result.loss,
        0.0,
    )


def _apart(
    x: Tensor,
    gram: Tensor,
    weights: Sequence[Tensor],
    weight_operands: Sequence[Sequence[Operand]],
    activations: Sequence[Operand],
    search: LayerSearch,
    fisher: Sequence[Tensor] | None,
    layer: str,
) -> Decision:
    searches = (
        [partial(search, fisher=own) for own in fisher] if fisher else [search] * len(weights)
    )
    found = tuple(
        _one_weight(x, gram, *given, layer)
        for given in zip(weights, weight_operands, searches, strict=True)
    )
    rounded = [
        _values(weight, scales, operand)
        for weight, (operand, scales) in zip(weights, found, strict=True)
    ]
    losses = [
        _loss(x, weights, rounded, operand, fisher, layer) for operand in activations or (None,)
    ]
    best = min(range(len(losses)), key=losses.__getitem__)
    return Decision(found, activations[best] if activations else None, None, losses[best], 0.0)


def _nearest(
    weights: Sequence[Tensor],
    given: Sequence[Operand],
    activations: Sequence[Operand],
    loss: float,
) -> Decision:
    found = tuple(
        (operand, quantize(weight, operand)[1])
        for weight, operand in zip(weights, given, strict=True)
    )
    return Decision(found, activations[0] if activations else None, None, loss, 0.0)


def _one_weight(
    x: Tensor,
    gram: Tensor,
    weight: Tensor,
    operands: Sequence[Operand],
    search: LayerSearch,
    layer: str,
) -> tuple[Operand, tuple[Tensor, ...]]:
    if _is_per_row(operands[:1]):
        choice = search(x, weight, [o.format for o in operands], []).weight
        return replace(operands[0], format=choice.spec), (choice.scale,)
    tried = [(operand, _scales(weight, gram, operand, layer)) for operand in operands]
    errors = [
        float(output_error(weight, _values(weight, scales, operand), gram).sum())
        for operand, scales in tried
    ]
    return tried[min(range(len(errors)), key=errors.__getitem__)]


def _scales(weight: Tensor, gram: Tensor, operand: Operand, layer: str) -> tuple[Tensor, ...]:
    """Return the better of the operand's own scales and of those that a search finds."""
    _, own = quantize(weight, operand, layer=layer)
    if operand.block is None or operand.block.is_real:
        return own
    _, found = search_block_scales(weight, operand, gram.diagonal(), layer=layer)
    candidates = [own, found]
    errors = [
        float(output_error(weight, _values(weight, scales, operand), gram).sum())
        for scales in candidates
    ]
    return candidates[min(range(2), key=errors.__getitem__)]


def _values(weight: Tensor, scales: tuple[Tensor, ...], operand: Operand) -> Tensor:
    return dequantize(quantize_with(weight, scales, operand), scales, operand)


def _rounded(weights: Sequence[Tensor], given: Sequence[Operand], layer: str) -> list[Tensor]:
    return [
        dequantize(*quantize(weight, operand, layer=layer), operand)
        for weight, operand in zip(weights, given, strict=True)
    ]


def _loss(
    x: Tensor,
    weights: Sequence[Tensor],
    rounded: Sequence[Tensor],
    activation: Operand | None,
    fisher: Sequence[Tensor] | None,
    layer: str,
) -> float:
    """Return the mean (weighted) squared error of the outputs of all layers."""
    seen = x
    if activation is not None:
        seen = dequantize(*quantize(x, activation, layer=layer), activation)
    total, count = 0.0, 0
    for number, (weight, quantized) in enumerate(zip(weights, rounded, strict=True)):
        error = (seen @ quantized.T - x @ weight.float().T).double().square()
        total += float((error if fisher is None else error * fisher[number]).sum())
        count += error.numel()
    return total / count
