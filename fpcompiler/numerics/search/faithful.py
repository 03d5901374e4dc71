"""The search of LLM-FP4 as its authors wrote it, to compare with.

Candidates are ``gamma * b``, where ``b`` is the real bias that puts the largest magnitude at the
largest number. The bias is a logarithm, so what the candidates clip depends on the unit of the
tensor, no clip at all (``gamma = 1``) is not among them, and the result can be worse than rounding
to nearest. :func:`fpcompiler.numerics.search.search_layer` has none of that.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import OptionError
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.search.formats import bias_of, largest_of
from fpcompiler.numerics.search.input_losses import InputLosses, input_losses
from fpcompiler.numerics.search.layer import check_formats, rtn_choices
from fpcompiler.numerics.search.losses import pair_losses, row_losses
from fpcompiler.numerics.search.problem import Choice, Problem, scale_of
from fpcompiler.numerics.search.result import SearchResult, pair_table

GAMMAS: Final = tuple(0.01 + i * (1.2 - 0.01) / 100 for i in range(100))
"""The candidates that the released code evaluates; it makes one more, 1.2, and leaves it out."""


class Order(enum.Enum):
    """What comes after what inside a round."""

    FPQ = "fpq"
    """Biases of weights, biases of inputs, weight format, input format (the code's FPQ class).
    Formats are committed last: biases of inputs are searched against the weight before this round,
    which in the first round has no clip and the initial exponent width."""
    PAPER = "paper"
    """Biases and then format of the inputs, then those of the weight (Algorithm 1)."""


@dataclass(frozen=True)
class FaithfulOptions:
    """The options of the published search.

    Attributes:
        order: What comes after what inside a round.
        rounds: How many rounds are made.
        exponent_bits: Of the formats to start with, where they are among those to choose from;
            otherwise the first of these is.
        max_bytes: Working memory, as in :class:`SearchOptions`.
    """

    order: Order = Order.FPQ
    rounds: int = 3
    exponent_bits: int = 2
    max_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            OptionError: If one of them is less than 1.
        """
        if min(self.rounds, self.exponent_bits, self.max_bytes) < 1:
            raise OptionError(
                "a search needs at least one round, exponent bit and byte, not rounds="
                f"{self.rounds}, exponent_bits={self.exponent_bits}, max_bytes={self.max_bytes}."
            )


def search_layer_faithful(
    x: Tensor,
    weight: Tensor,
    weight_formats: Sequence[FloatSpec],
    activation_formats: Sequence[FloatSpec] = (),
    *,
    fisher: Tensor | None = None,
    options: FaithfulOptions | None = None,
    layer: str = "",
) -> SearchResult:
    """Choose formats and clips as LLM-FP4 does (arXiv 2310.16836, section 3.1 and its code).

    Args:
        x: Calibration inputs ``[T, K]``, any floating-point dtype.
        weight: ``[N, K]``, any floating-point dtype.
        weight_formats: Formats to choose among, one for the whole weight.
        activation_formats: Formats to choose among for the inputs; none if they stay as they are.
        fisher: Weights ``[T, N]`` of the squared errors; by default 1.
        options: By default ``FaithfulOptions()``.
        layer: Named in errors.

    Raises:
        NumericsError: If tensors do not fit each other, or hold NaN or infinity.
        FormatError: If there is no format for weights, or one cannot hold elements.
    """
    options = options or FaithfulOptions()
    check_formats(weight_formats, activation_formats, layer)
    problem = Problem.of(x, weight, fisher, max_bytes=options.max_bytes, layer=layer)
    return _Faithful(problem, tuple(weight_formats), tuple(activation_formats), options).run()


class _Faithful:
    """The committed formats and scales, and the best scales of each format."""

    def __init__(
        self,
        problem: Problem,
        weights: tuple[FloatSpec, ...],
        activations: tuple[FloatSpec, ...],
        options: FaithfulOptions,
    ) -> None:
        self._problem = problem
        self._options = options
        plain, inputs = rtn_choices(problem, weights, activations)
        self._plain_weights = {choice.spec: choice for choice in plain}
        self._plain_inputs = inputs
        self._best_weights = dict(self._plain_weights)
        self._best_inputs = {choice.spec: choice for choice in inputs if choice is not None}
        self._weight = self._best_weights[_initial(weights, options.exponent_bits)]
        self._activation: Choice | None = None
        if activations:
            self._activation = self._best_inputs[_initial(activations, options.exponent_bits)]
        self._by_weight: dict[str, float] = {}
        self._by_activation: dict[str, float] = {}

    def run(self) -> SearchResult:
        """Make all rounds and compare with no clip."""
        for _ in range(self._options.rounds):
            for step in _STEPS[self._options.order]:
                step(self)
        problem = self._problem
        weights = [self._weight, *self._plain_weights.values()]
        rounded = [problem.round_weight(choice) for choice in weights]
        found = pair_losses(problem, [self._activation], rounded[:1]).sum()
        rtn = pair_losses(problem, self._plain_inputs, rounded[1:]).sum(-1)
        pairs = pair_table(tuple(self._plain_weights), tuple(self._best_inputs), rtn)
        return SearchResult(
            self._weight,
            self._activation,
            problem.mean(float(found)),
            {pair: problem.mean(loss) for pair, loss in pairs.items()},
            self._by_weight,
            self._by_activation,
            self._options.rounds,
        )

    def search_weight_biases(self) -> None:
        """Find the best bias of each row in each format, for the committed inputs."""
        losses = row_losses(self._problem, self._activation, None)
        largest = self._problem.weight_largest
        for spec in self._best_weights:
            scales = candidate_scales(largest, spec)
            best = losses(spec, scales).argmin(0)
            chosen = torch.stack(scales).squeeze(-1).gather(0, best[None])
            self._best_weights[spec] = Choice(spec, chosen.T.contiguous())

    def search_activation_biases(self) -> None:
        """Find the best bias of the inputs in each format, for the committed weight."""
        losses_of = self._input_losses()
        for spec in self._best_inputs:
            scales = candidate_scales(self._problem.x_largest, spec)
            losses = losses_of([Choice(spec, scale) for scale in scales])
            self._best_inputs[spec] = Choice(spec, scales[int(losses.argmin())])

    def commit_weight(self) -> None:
        """Take the weight format with the least loss, for the committed inputs."""
        losses = row_losses(self._problem, self._activation, None)
        for spec, choice in self._best_weights.items():
            total = float(losses(spec, [choice.scale]).sum())
            self._by_weight[spec.name] = self._problem.mean(total)
        self._weight = min(
            self._best_weights.values(), key=lambda choice: self._by_weight[choice.spec.name]
        )

    def commit_activation(self) -> None:
        """Take the format of the inputs with the least loss, for the committed weight."""
        choices = list(self._best_inputs.values())
        if not choices:
            return
        for choice, total in zip(choices, self._input_losses()(choices).tolist(), strict=True):
            self._by_activation[choice.spec.name] = self._problem.mean(total)
        self._activation = min(choices, key=lambda choice: self._by_activation[choice.spec.name])

    def _input_losses(self) -> InputLosses:
        """Return the losses of inputs with the committed weight."""
        return input_losses(self._problem, self._problem.round_weight(self._weight))


_STEPS: Final[Mapping[Order, tuple[Callable[[_Faithful], None], ...]]] = MappingProxyType(
    {
        Order.FPQ: (
            _Faithful.search_weight_biases,
            _Faithful.search_activation_biases,
            _Faithful.commit_weight,
            _Faithful.commit_activation,
        ),
        Order.PAPER: (
            _Faithful.search_activation_biases,
            _Faithful.commit_activation,
            _Faithful.search_weight_biases,
            _Faithful.commit_weight,
        ),
    }
)


def candidate_scales(largest: Tensor, spec: FloatSpec) -> list[Tensor]:
    """Return the scales of the biases ``gamma * b`` for each gamma of the published grid.

    Args:
        largest: fp32 ``[R, 1]``, the largest magnitude of each group.
        spec: The format.

    Returns:
        For each of :data:`GAMMAS` fp32 ``[R, 1]``, held within the range of fp32; 1 for a group of
        zeros.
    """
    bias, limits = bias_of(largest, spec), torch.finfo(torch.float32)
    clips = [largest_of(gamma * bias, spec).clamp(limits.tiny, limits.max) for gamma in GAMMAS]
    return [scale_of(clip.float().masked_fill(largest == 0, 0.0), spec) for clip in clips]


def _initial(specs: Sequence[FloatSpec], exponent_bits: int) -> FloatSpec:
    return next((spec for spec in specs if spec.exponent_bits == exponent_bits), specs[0])
