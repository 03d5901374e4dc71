"""The format and clip search for one linear layer.

It is the joint search of LLM-FP4 (arXiv 2310.16836, section 3.1) without what its grid over
biases does: candidates here are parts of the largest magnitude (:mod:`.grid`), so that the result
does not depend on the scale of the tensors, and rounding to nearest with the largest magnitudes is
where the search starts. What is found is kept only where its loss over all tokens is less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fpcompiler.errors import FormatError, OptionError, describe_layer
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.search.grid import (
    ACTIVATION_GRID,
    WEIGHT_GRID,
    Grid,
    Losses,
    resume,
    scan,
)
from fpcompiler.numerics.search.input_losses import InputLosses, input_losses
from fpcompiler.numerics.search.losses import RowLosses, pair_losses, row_losses
from fpcompiler.numerics.search.problem import Choice, Problem
from fpcompiler.numerics.search.result import SearchResult, pair_table


@dataclass(frozen=True)
class SearchOptions:
    """How much a search looks at.

    Attributes:
        rounds: How often inputs and weights are searched in turn, at most.
        sample: On how many tokens, small and large ones, clips of inputs are compared before the
            best of each format are compared on all of them. Clips of weights are compared on all
            tokens, unless the losses are Fisher-weighted or the tokens fewer than the inputs.
        max_bytes: Working memory, at least what one token and one weight in fp32 take. On top of
            it come the weight in fp32, and at the start once per format of weights. Sums over
            tokens, which are the faster way, need 16 bytes for each pair of inputs.
        weight_grid: Clips of weights.
        activation_grid: Clips of inputs.
    """

    rounds: int = 3
    sample: int = 2048
    max_bytes: int = 2 << 30
    weight_grid: Grid = WEIGHT_GRID
    activation_grid: Grid = ACTIVATION_GRID

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            OptionError: If one of them is less than 1.
        """
        if min(self.rounds, self.sample, self.max_bytes) < 1:
            raise OptionError(
                "a search needs at least one round, token and byte, not rounds="
                f"{self.rounds}, sample={self.sample}, max_bytes={self.max_bytes}."
            )


def search_layer(
    x: Tensor,
    weight: Tensor,
    weight_formats: Sequence[FloatSpec],
    activation_formats: Sequence[FloatSpec] = (),
    *,
    fisher: Tensor | None = None,
    options: SearchOptions | None = None,
    layer: str = "",
) -> SearchResult:
    """Choose formats and clips for ``y = x @ weight.T`` that make the error of ``y`` small.

    The weight has one scale per row, the inputs have one scale. The loss over ``x`` is never more
    than that of rounding to nearest without a clip, with any pair of the formats.

    Args:
        x: Calibration inputs ``[T, K]``, any floating-point dtype.
        weight: ``[N, K]``, any floating-point dtype.
        weight_formats: Formats to choose among, one for the whole weight.
        activation_formats: Formats to choose among for the inputs; none if they stay as they are.
        fisher: Weights ``[T, N]`` of the squared errors, such as squared gradients of a model's
            loss with respect to ``y``; by default 1.
        options: By default ``SearchOptions()``.
        layer: Named in errors.

    Raises:
        NumericsError: If tensors do not fit each other, or hold NaN or infinity.
        FormatError: If there is no format for weights, or one cannot hold elements.
    """
    options = options or SearchOptions()
    check_formats(weight_formats, activation_formats, layer)
    problem = Problem.of(x, weight, fisher, max_bytes=options.max_bytes, layer=layer)
    search = _Search(problem, tuple(weight_formats), tuple(activation_formats), options)
    return search.run()


def check_formats(
    weights: Sequence[FloatSpec], activations: Sequence[FloatSpec], layer: str
) -> None:
    """Check the formats that a search is to choose among.

    Raises:
        FormatError: If there is none for weights, or one cannot hold elements.
    """
    if not weights:
        raise FormatError(f"{describe_layer(layer)}: a search needs at least one weight format.")
    for spec in (*weights, *activations):
        if not spec.signed:
            raise FormatError(f"{describe_layer(layer)}: {spec} has no sign and holds only scales.")


def rtn_choices(
    problem: Problem, weights: Sequence[FloatSpec], activations: Sequence[FloatSpec]
) -> tuple[list[Choice], list[Choice | None]]:
    """Return weights and inputs without a clip, one of each format; None for inputs as they are."""
    inputs = [problem.activation_choice(spec, 1.0) for spec in activations]
    return [problem.weight_choice(spec, 1.0) for spec in weights], [*inputs] or [None]


class _Search:
    """The best choice so far, and where each format's best clips were."""

    def __init__(
        self,
        problem: Problem,
        weights: tuple[FloatSpec, ...],
        activations: tuple[FloatSpec, ...],
        options: SearchOptions,
    ) -> None:
        self._problem = problem
        self._weights = weights
        self._activations = activations
        self._options = options
        self._index = problem.sample(options.sample)
        self._weight_positions: dict[FloatSpec, Tensor] = {}
        self._activation_positions: dict[FloatSpec, Tensor] = {}
        self._by_weight: dict[str, float] = {}
        self._by_activation: dict[str, float] = {}
        self._rtn = self._start()

    def run(self) -> SearchResult:
        """Search inputs and weights in turn, until that changes nothing."""
        limit = self._options.rounds if self._activations else 1
        rounds = 0
        for rounds in range(1, limit + 1):
            moved = self._search_activations() if self._activations else False
            if rounds > 1 and not moved:
                break
            self._search_weights()
        mean = self._problem.mean
        return SearchResult(
            self._weight,
            self._activation,
            mean(self._loss),
            {pair: mean(loss) for pair, loss in self._rtn.items()},
            self._by_weight,
            self._by_activation,
            rounds,
        )

    def _start(self) -> dict[tuple[str, str], float]:
        """Start with the best pair of formats without a clip; return the losses of all pairs."""
        problem = self._problem
        weights, inputs = rtn_choices(problem, self._weights, self._activations)
        rounded = [problem.round_weight(choice) for choice in weights]
        losses = pair_losses(problem, inputs, rounded).sum(-1)
        best = _least(losses.flatten().tolist())
        self._weight = weights[best % len(weights)]
        self._activation = inputs[best // len(weights)]
        self._loss = float(losses.flatten()[best])
        return pair_table(self._weights, self._activations, losses)

    def _search_activations(self) -> bool:
        """Search clip and format of the inputs for the current weight; return if they changed."""
        problem, grid = self._problem, self._options.activation_grid
        weight = problem.round_weight(self._weight)
        evaluate = input_losses(problem, weight, self._index)
        finalists = []
        for spec in self._activations:
            losses = self._activation_losses(spec, evaluate)
            position = self._activation_positions.get(spec)
            like = problem.x_largest[0]
            found = scan(losses, grid, like) if position is None else resume(losses, grid, position)
            self._activation_positions[spec] = found.position
            finalists.append(problem.activation_choice(spec, grid.gamma(found.position)))
        totals = pair_losses(problem, finalists, [weight])[:, 0].sum(-1).tolist()
        for spec, total in zip(self._activations, totals, strict=True):
            self._by_activation[spec.name] = problem.mean(total)
        best = _least(totals)
        if totals[best] >= self._loss:
            return False
        self._activation, self._loss = finalists[best], totals[best]
        return True

    def _activation_losses(self, spec: FloatSpec, evaluate: InputLosses) -> Losses:
        """Return the losses of clips of the inputs, on the sample of tokens."""
        problem, grid = self._problem, self._options.activation_grid

        def losses(positions: Sequence[Tensor]) -> Tensor:
            choices = [problem.activation_choice(spec, grid.gamma(p)) for p in positions]
            return evaluate(choices)[:, None]

        return losses

    def _search_weights(self) -> None:
        """Search the clips and the format of the weight for the current inputs."""
        problem, grid = self._problem, self._options.weight_grid
        evaluate = row_losses(problem, self._activation, self._index)
        totals = []
        for spec in self._weights:
            losses = self._weight_losses(spec, evaluate)
            position = self._weight_positions.get(spec)
            like = problem.weight_largest[:, 0]
            found = scan(losses, grid, like) if position is None else resume(losses, grid, position)
            self._weight_positions[spec] = found.position
            totals.append(float(found.loss.sum()))
            self._by_weight[spec.name] = problem.mean(totals[-1], evaluate.tokens)
        self._settle_weight(self._weights[_least(totals)])

    def _weight_losses(self, spec: FloatSpec, evaluate: RowLosses) -> Losses:
        """Return the losses of clips of the rows."""
        problem, grid = self._problem, self._options.weight_grid

        def losses(positions: Sequence[Tensor]) -> Tensor:
            gammas = [grid.gamma(position)[:, None] for position in positions]
            return evaluate(spec, [problem.weight_choice(spec, gamma).scale for gamma in gammas])

        return losses

    def _settle_weight(self, spec: FloatSpec) -> None:
        """Take over the clips of a format, row by row where they help on all tokens."""
        problem, grid = self._problem, self._options.weight_grid
        found = problem.weight_choice(spec, grid.gamma(self._weight_positions[spec])[:, None])
        plain = problem.weight_choice(spec, 1.0)
        rounded = [problem.round_weight(choice) for choice in (found, plain)]
        clipped, whole = pair_losses(problem, [self._activation], rounded)[0]
        total = float(torch.minimum(clipped, whole).sum())
        if total >= self._loss:
            return
        scale = torch.where((clipped < whole)[:, None], found.scale, plain.scale)
        self._weight, self._loss = Choice(spec, scale), total


def _least(losses: Sequence[float]) -> int:
    """Return the place of the least number; of equal ones the first."""
    return min(range(len(losses)), key=losses.__getitem__)
