"""The squared output error of candidates for the inputs, with one quantized weight.

With ``e = wq - w`` and ``d = xq - x`` the error of a token is ``d @ wq + x @ e``. Its square,
summed over the outputs, needs only products among the inputs: with ``A = wq wq'`` and
``B = 2 e wq'`` it is ``d A d' + x B d' + |x @ e|**2``, at ``T * K * K`` for each candidate and not
``T * N * K``. As in :mod:`.losses`, nothing large is subtracted from something large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fpcompiler.numerics.search.losses import pair_losses
from fpcompiler.numerics.search.problem import Choice, Problem

InputLosses = Callable[[Sequence[Choice]], Tensor]
"""From candidates for the inputs to the loss of each, summed over rows: fp64 ``[len]``."""


class QuadraticLosses:
    """Losses from sums over outputs, made once.

    Args:
        problem: The layer, without Fisher weights.
        weight: The quantized weight ``[N, K]``, in units.
        index: Which tokens to sum over, or None for all.
    """

    def __init__(self, problem: Problem, weight: Tensor, index: Tensor | None) -> None:
        self._problem = problem
        self._index = index
        error = weight - problem.weight
        self._square = weight.T @ weight
        self._cross = (error.T @ weight).mul_(2)
        self._constant = sum(
            (x @ error.T).square_().sum(0).sum(dtype=torch.float64)
            for x, _ in problem.chunks(index)
        )

    def __call__(self, choices: Sequence[Choice]) -> Tensor:
        """Return the loss of each candidate."""
        problem = self._problem
        totals = torch.zeros(len(choices), dtype=torch.float64, device=problem.x.device)
        for x, _ in problem.chunks(self._index):
            linear = x @ self._cross
            for number, choice in enumerate(choices):
                difference = problem.round_inputs(x, choice).sub_(x)
                product = torch.addmm(linear, difference, self._square)
                tokens = product.mul_(difference).sum(-1)
                totals[number] += tokens.sum(dtype=torch.float64)
        return totals + self._constant


def input_losses(problem: Problem, weight: Tensor, index: Tensor | None = None) -> InputLosses:
    """Return the cheaper way to the losses of candidates for the inputs.

    Sums over outputs need less work where there are more outputs than inputs, and two matrices
    ``[K, K]``. Without the memory for them, or with Fisher weights, tokens are multiplied with the
    weight.

    Args:
        problem: The layer.
        weight: The quantized weight ``[N, K]``, in units.
        index: Which tokens to sum over, or None for all.
    """
    outputs, inputs = weight.shape
    if problem.fisher is None and outputs > inputs and 16 * inputs * inputs <= problem.max_bytes:
        return QuadraticLosses(problem, weight, index)

    def direct(choices: Sequence[Choice]) -> Tensor:
        return pair_losses(problem, choices, [weight], index)[:, 0].sum(-1)

    return direct
