"""The squared output error of a layer with quantized weights and inputs.

Per row of the weight it is the sum over tokens of ``F * (xq @ wq - x @ w)**2``. There are two ways
to it. :class:`DirectLosses` multiplies the matrices, at ``T * N * K`` for each candidate.
:class:`GramLosses` writes ``e = wq - w`` and ``d = xq - x``, so that the error of a token is
``xq @ e + d @ w``, and with the sums over tokens ``A = xq' xq`` and ``C = xq' d`` the loss of a row
is ``e A e' + 2 e C w' + |d w'|**2``, at ``N * K * K`` for each candidate. Nothing large is
subtracted from something large there: without quantized inputs only ``e A e'`` is left.

Losses are sums in the units of the problem; fp32 products are added up in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.search.problem import Choice, Problem
from fpcompiler.numerics.search.scaled import round_scaled


class RowLosses(Protocol):
    """The losses of candidate weights, for one choice of activations."""

    @property
    def tokens(self) -> int:
        """How many tokens the losses are summed over."""

    def __call__(self, spec: FloatSpec, scales: Sequence[Tensor]) -> Tensor:
        """Return the loss of each row for each tensor of scales: fp64 ``[len(scales), N]``."""


def pair_losses(
    problem: Problem,
    activations: Sequence[Choice | None],
    weights: Sequence[Tensor],
    index: Tensor | None = None,
) -> Tensor:
    """Return the loss of each row, for each choice of activations with each quantized weight.

    Args:
        problem: The layer.
        activations: What the inputs are quantized to; None for as they are.
        weights: Quantized weights ``[N, K]``, in units.
        index: Which tokens to sum over, or None for all.

    Returns:
        fp64 ``[len(activations), len(weights), N]``.
    """
    shape = (len(activations), len(weights), problem.weight.shape[0])
    totals = torch.zeros(shape, dtype=torch.float64, device=problem.x.device)
    for x, fisher in problem.chunks(index):
        target = x @ problem.weight.T
        for i, activation in enumerate(activations):
            rounded = problem.round_inputs(x, activation)
            for j, weight in enumerate(weights):
                squares = (rounded @ weight.T).sub_(target).square_()
                if fisher is not None:
                    squares.mul_(fisher)
                totals[i, j] += squares.sum(0, dtype=torch.float64)
    return totals


class DirectLosses:
    """Losses by multiplying candidates with the inputs, of all tokens or of some."""

    def __init__(self, problem: Problem, activation: Choice | None, index: Tensor | None) -> None:
        self._problem = problem
        self._activation = activation
        self._index = index
        self.tokens: Final = problem.tokens if index is None else len(index)

    def __call__(self, spec: FloatSpec, scales: Sequence[Tensor]) -> Tensor:
        """Return the loss of each row for each tensor of scales: fp64 ``[len(scales), N]``."""
        problem = self._problem
        step = max(1, problem.max_bytes // (8 * problem.weight.numel()))
        parts = []
        for start in range(0, len(scales), step):
            choices = [Choice(spec, scale) for scale in scales[start : start + step]]
            weights = [problem.round_weight(choice) for choice in choices]
            parts.append(pair_losses(problem, [self._activation], weights, self._index)[0])
        return torch.cat(parts)


class GramLosses:
    """Losses from sums over all tokens, made once."""

    def __init__(self, problem: Problem, activation: Choice | None) -> None:
        outputs, inputs = problem.weight.shape
        self._problem = problem
        self._gram = problem.weight.new_zeros(inputs, inputs)
        self._linear: Tensor | None = None
        self._constant = problem.weight.new_zeros(outputs, dtype=torch.float64)
        self.tokens: Final = problem.tokens
        if activation is None:
            for x, _ in problem.chunks(None):
                self._gram.addmm_(x.T, x)
            return
        cross = torch.zeros_like(self._gram)
        for x, _ in problem.chunks(None):
            rounded = problem.round_inputs(x, activation)
            difference = rounded - x
            self._gram.addmm_(rounded.T, rounded)
            cross.addmm_(rounded.T, difference)
            drift = difference @ problem.weight.T
            self._constant += drift.square_().sum(0, dtype=torch.float64)
        self._linear = (problem.weight @ cross.T).mul_(2)

    def __call__(self, spec: FloatSpec, scales: Sequence[Tensor]) -> Tensor:
        """Return the loss of each row for each tensor of scales: fp64 ``[len(scales), N]``."""
        losses = torch.stack([self._constant] * len(scales))
        for part in self._rows():
            weight = self._problem.weight[part]
            for loss, scale in zip(losses, scales, strict=True):
                unit = self._problem.weight_unit
                error = round_scaled(weight, scale[part] * unit, spec).sub_(weight)
                product = error @ self._gram
                if self._linear is not None:
                    product += self._linear[part]
                loss[part] += product.mul_(error).sum(-1, dtype=torch.float64)
        return losses

    def _rows(self) -> Iterator[slice]:
        outputs, inputs = self._problem.weight.shape
        step = max(1, self._problem.max_bytes // (32 * inputs))
        for start in range(0, outputs, step):
            yield slice(start, start + step)


def row_losses(problem: Problem, activation: Choice | None, index: Tensor | None) -> RowLosses:
    """Return the cheaper way to the losses of candidate weights.

    Sums over tokens need less work where there are more tokens than inputs, and two matrices
    ``[K, K]``. Without the memory for them, or with Fisher weights, which would need such matrices
    for each row, candidates are multiplied with the tokens of ``index``.
    """
    inputs = problem.weight.shape[1]
    fits = 16 * inputs * inputs <= problem.max_bytes
    if problem.fisher is None and problem.tokens > inputs and fits:
        return GramLosses(problem, activation)
    return DirectLosses(problem, activation, index)
