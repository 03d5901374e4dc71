"""A linear layer with its calibration inputs, checked, and read a chunk of tokens at a time.

Inside a search all tensors are in units of a power of two near their largest magnitude. That is
exact, so it changes no result, and squares of errors neither overflow nor underflow in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.scales import real_scale
from fpcompiler.numerics.search.scaled import round_scaled
from fpcompiler.operand import Granularity, Operand, ScaleLevel


@dataclass(frozen=True)
class Choice:
    """A format and its scale, as :func:`fpcompiler.numerics.quantize` would return it.

    Attributes:
        spec: The element format.
        scale: fp32 ``[N, 1]`` for a weight, ``[1, 1]`` for activations.
    """

    spec: FloatSpec
    scale: Tensor


@dataclass(frozen=True)
class Problem:
    """The layer ``y = x @ weight.T``, whose error is to be made small.

    Attributes:
        x: ``[T, K]``, any floating-point dtype; what :meth:`chunks` yields is in units.
        weight: fp32 ``[N, K]``, in units.
        fisher: ``[T, N]``, the weight of each output's squared error, or None for 1.
        token_largest: fp32 ``[T, 1]``, the largest magnitude of each token.
        weight_largest: fp32 ``[N, 1]``, the largest magnitude of each row of the weight.
        x_unit: ``x`` is multiplied by this power of two.
        weight_unit: The same for the weight.
        fisher_unit: The same for ``fisher``.
        max_bytes: Working memory. Half is for a chunk of tokens, of which each takes 16 bytes for
            each input and output, half for candidates or sums over tokens.
    """

    x: Tensor
    weight: Tensor
    fisher: Tensor | None
    token_largest: Tensor
    weight_largest: Tensor
    x_unit: float
    weight_unit: float
    fisher_unit: float
    max_bytes: int

    @classmethod
    def of(
        cls, x: Tensor, weight: Tensor, fisher: Tensor | None, *, max_bytes: int, layer: str
    ) -> Problem:
        """Check the tensors and find their units.

        Raises:
            NumericsError: If shapes or devices do not fit, a tensor is empty, not floating-point,
                or holds NaN or infinity (after conversion to fp32), or ``fisher`` is negative.
        """
        _check(x, weight, fisher, layer)
        x, weight = x.detach(), weight.detach()
        token_largest = _largest(x, "calibration input", layer)
        weight_largest = _largest(weight, "weight", layer)
        weight_unit = _unit(weight_largest.amax())
        return cls(
            x,
            weight.float().mul(weight_unit).contiguous(),
            fisher if fisher is None else fisher.detach(),
            token_largest,
            weight_largest,
            _unit(token_largest.amax()),
            weight_unit,
            1.0 if fisher is None else _fisher_unit(fisher, layer),
            max_bytes,
        )

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return self.x.shape[0]

    @property
    def x_largest(self) -> Tensor:
        """The largest magnitude of ``x``, fp32 ``[1, 1]``."""
        return self.token_largest.amax(0, keepdim=True)

    def sample(self, count: int) -> Tensor | None:
        """Return the indices of ``count`` tokens, or None for all of them.

        They are at equal distances in the order of their largest magnitudes, the largest included:
        the few tokens with massive activations decide where to clip, and must not be missed.
        """
        if count >= self.tokens:
            return None
        order = self.token_largest[:, 0].sort(descending=True, stable=True).indices
        places = torch.arange(count, device=order.device) * self.tokens // count
        return order[places].sort().values

    def chunks(self, index: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield ``x`` (fp32, in units) and ``fisher`` of some or all tokens, a chunk at a time."""
        outputs, inputs = self.weight.shape
        count = self.tokens if index is None else len(index)
        step = max(1, self.max_bytes // (32 * (inputs + outputs)))
        for start in range(0, count, step):
            stop = min(start + step, count)
            part = slice(start, stop) if index is None else index[start:stop]
            x = self.x[part].float() * self.x_unit
            yield x, None if self.fisher is None else self.fisher[part].float() * self.fisher_unit

    def weight_choice(self, spec: FloatSpec, gamma: Tensor | float) -> Choice:
        """Return the scales that clip rows at ``gamma`` (fp32 ``[N, 1]``) of their largest."""
        return Choice(spec, scale_of(self.weight_largest * gamma, spec))

    def activation_choice(self, spec: FloatSpec, gamma: Tensor | float) -> Choice:
        """Return the scale that clips the inputs at ``gamma`` times their largest."""
        return Choice(spec, scale_of(self.x_largest * gamma, spec))

    def round_weight(self, choice: Choice) -> Tensor:
        """Return the quantized weight, in units."""
        return round_scaled(self.weight, choice.scale * self.weight_unit, choice.spec)

    def round_inputs(self, x: Tensor, choice: Choice | None) -> Tensor:
        """Return a chunk of inputs as it is quantized; itself if it is not."""
        return x if choice is None else round_scaled(x, choice.scale * self.x_unit, choice.spec)

    def mean(self, total: float, tokens: int | None = None) -> float:
        """Return the mean squared error of an output, from the sum over tokens, in units."""
        count = (tokens or self.tokens) * self.weight.shape[0]
        unit = self.x_unit * self.weight_unit
        return total / count / unit / unit / self.fisher_unit


def scale_of(largest: Tensor, spec: FloatSpec) -> Tensor:
    """Return the scale that puts ``largest`` (fp32) at the largest number of a format."""
    largest = largest.clamp(max=torch.finfo(torch.float32).max)
    return real_scale(largest, Operand(spec, (ScaleLevel(Granularity.ROW),)))


def _check(x: Tensor, weight: Tensor, fisher: Tensor | None, layer: str) -> None:
    tensors = [x, weight] if fisher is None else [x, weight, fisher]
    shapes = [list(tensor.shape) for tensor in tensors]
    fits = all(len(shape) == 2 for shape in shapes) and shapes[0][1] == shapes[1][1]
    if fits and fisher is not None:
        fits = shapes[2] == [shapes[0][0], shapes[1][0]]
    if not fits or not all(tensor.numel() for tensor in tensors):
        raise NumericsError(
            f"{describe_layer(layer)}: a search needs inputs [T, K], a weight [N, K] and, if any, "
            f"Fisher weights [T, N], none of them empty; the shapes are {shapes}."
        )
    if not all(tensor.is_floating_point() and tensor.device == x.device for tensor in tensors):
        kinds = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
        raise NumericsError(
            f"{describe_layer(layer)}: a search needs floating-point tensors on one device, "
            f"not {kinds}."
        )


def _largest(rows: Tensor, what: str, layer: str) -> Tensor:
    """Return the largest magnitude of each row, fp32 ``[R, 1]``."""
    low, high = torch.aminmax(rows, dim=-1, keepdim=True)
    largest = torch.maximum(low.abs(), high.abs()).float()
    if not bool(largest.isfinite().all()):
        raise NumericsError(
            f"{describe_layer(layer)}: the {what} holds NaN/Inf (or values beyond fp32). Check the "
            "weights and the calibration data, or skip the layer."
        )
    return largest


def _fisher_unit(fisher: Tensor, layer: str) -> float:
    unit = _unit(_largest(fisher.detach().reshape(1, -1), "tensor of Fisher weights", layer))
    if bool((fisher < 0).any()):
        raise NumericsError(
            f"{describe_layer(layer)}: Fisher weights are squared gradients, but some are negative."
        )
    return unit


def _unit(largest: Tensor) -> float:
    """Return the power of two, a normal fp32 number, that brings ``largest`` to about 1."""
    return math.ldexp(1.0, max(-126, min(126, -math.frexp(float(largest))[1])))
