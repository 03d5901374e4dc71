"""Round-to-nearest quantization of a whole model in plain eager torch: the oracle of the e2e tests.

Independent of ``fpcompiler.numerics`` on purpose: there are no codes, no packing, no graph and no
plan, and rounding divides by the distance of two neighbours. What the compiler does to a model is
done here by modules that replace the model's own.

Text of a quantizer, as in a scheme: ``f4E2M1FN@row:f32/block32:f8E8M0FNU:floor``.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_SMALLEST_SCALE = 2.0**-126
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Grid:
    """The values of a format.

    Attributes:
        mantissa_bits: Steps between two powers of two, as a power of two.
        smallest_exponent: The exponent of the smallest normal value; below it steps are equal.
        max: The largest value.
    """

    mantissa_bits: int
    smallest_exponent: int
    max: float

    @property
    def largest_exponent(self) -> int:
        """The exponent of the largest value."""
        return math.frexp(self.max)[1] - 1

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest values, ties to even."""
        # The power of two below each value: its sign and mantissa masked away.
        power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
        step = power.clamp_(min=2.0**self.smallest_exponent).mul_(2.0**-self.mantissa_bits)
        return (x / step).round_().mul_(step).clamp_(-self.max, self.max)


GRIDS = {
    "f4E2M1FN": Grid(1, 0, 6.0),
    "f6E2M3FN": Grid(3, 0, 7.5),
    "f6E3M2FN": Grid(2, -2, 28.0),
    "f8E4M3FN": Grid(3, -6, 448.0),
}


@dataclass(frozen=True)
class Quantizer:
    """Rounds a tensor to a grid with the scales of a scheme, along the last axis.

    Attributes:
        grid: The values.
        outer: Which values share a real scale: "tensor", "row", "token" or "".
        block: Values that share a scale of their own, or 0.
        scale: The format of the scale of blocks: "f32", "f8E8M0FNU" or "f8E4M3FN".
        rounding: How that scale is rounded: "floor", "ceil", "rne" or "mse".
    """

    grid: Grid
    outer: str
    block: int
    scale: str
    rounding: str

    @classmethod
    def parse(cls, text: str) -> Quantizer:
        name, _, levels = text.partition("@")
        outer, block, scale, rounding = "", 0, "f32", ""
        for level in levels.split("/"):
            kind, size, form, mode = re.fullmatch(r"([a-z]+)(\d*):(\w+)(?::(\w+))?", level).groups()
            if kind == "block":
                block, scale = int(size), form
                rounding = mode or ("mse" if form == "f8E8M0FNU" else "rne")
            else:
                outer = kind
        return cls(GRIDS[name], outer, block, scale, rounding)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the rounded tensor, in fp32."""
        rows = x.float().reshape(-1, x.shape[-1])
        whole = rows.abs().amax() if self.outer == "tensor" else None
        # Parts small enough for the cache: several times as fast.
        parts = rows.split(max(1, _CHUNK // rows.shape[1]))
        return torch.cat([self._round_rows(part, whole) for part in parts]).view(x.shape)

    def _round_rows(self, rows: Tensor, whole: Tensor | None) -> Tensor:
        outer = self._outer_scale(rows, whole)
        if not self.block:
            return self._round(rows, outer)
        width = rows.shape[1]
        blocks = nnf.pad(rows, (0, -width % self.block)).unflatten(1, (-1, self.block))
        return self._round_blocks(blocks, outer[..., None]).flatten(1)[:, :width]

    def _outer_scale(self, rows: Tensor, whole: Tensor | None) -> Tensor:
        """Return the real scale of each row [rows, 1]."""
        if not self.outer:
            return torch.ones(len(rows), 1)
        amax = rows.abs().amax(1, keepdim=True) if whole is None else whole.expand(len(rows), 1)
        largest = self.grid.max * (448 if self.scale == "f8E4M3FN" else 1)
        return torch.where(amax > 0, (amax / largest).clamp(min=_SMALLEST_SCALE), 1.0)

    def _round_blocks(self, x: Tensor, outer: Tensor) -> Tensor:
        amax = x.abs().amax(-1, keepdim=True)
        if self.scale == "f32":
            return self._round(x, torch.where(amax > 0, amax / self.grid.max, 1.0))
        ratio = amax / (self.grid.max * outer)
        if self.scale == "f8E4M3FN":
            assert self.rounding == "rne"
            scale = GRIDS["f8E4M3FN"].round(ratio).clamp(min=2.0**-9)
            return self._round(x, torch.where(amax > 0, scale, 1.0) * outer)
        below, above = _powers_of_two_around(ratio)
        if self.rounding == "mse":
            low, high = self._round(x, below * outer), self._round(x, above * outer)
            low_error, high_error = ((y - x).square().sum(-1, keepdim=True) for y in (low, high))
            return torch.where(low_error < high_error, low, high)
        exponent = torch.frexp(amax / outer)[1] - 1 - self.grid.largest_exponent
        chosen = {
            "floor": torch.ldexp(torch.ones_like(amax), exponent),
            "ceil": above,
            "rne": torch.where(_nearer_above(ratio, below), above, below),
        }
        return self._round(x, chosen[self.rounding] * outer)

    def _round(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.grid.round(x / scale) * scale


def _powers_of_two_around(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return the powers of two next to ``ratio``, both equal to it if it is one; 1 for zero."""
    mantissa, exponent = torch.frexp(torch.where(ratio > 0, ratio, 1.0))
    below = torch.ldexp(torch.ones_like(mantissa), exponent - 1)
    return below, torch.where(mantissa == 0.5, below, 2 * below)


def _nearer_above(ratio: Tensor, below: Tensor) -> Tensor:
    """Whether the power of two above is nearer; in the middle, whether its code is even."""
    middle = 1.5 * below
    code = torch.frexp(below)[1] - 1 + 127
    return (ratio > middle) | ((ratio == middle) & (code % 2 == 1))


class FakeLinear(nn.Module):
    """A Linear (or GPT-2's Conv1D) with rounded weights and inputs."""

    def __init__(self, layer: nn.Module, weights: Quantizer, inputs: Quantizer | None) -> None:
        super().__init__()
        matrix = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        self.weight = nn.Parameter(weights(matrix.detach()), requires_grad=False)
        self.bias = layer.bias
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs:
            x = self.inputs(x)
        return nnf.linear(x, self.weight, self.bias)


class FakeConv(nn.Module):
    """A Conv1d or Conv2d as the product of its patches and its weights [out, in * kernel]."""

    def __init__(
        self, layer: nn.Conv1d | nn.Conv2d, weights: Quantizer, inputs: Quantizer | None
    ) -> None:
        super().__init__()
        assert layer.groups == 1
        self.flat = isinstance(layer, nn.Conv1d)
        one, zero = ((1,), (0,)) if self.flat else ((), ())
        self.kernel = one + layer.kernel_size
        self.geometry = {
            "dilation": one + layer.dilation,
            "padding": zero + layer.padding,
            "stride": one + layer.stride,
        }
        self.stride = layer.stride  # some models compute with it
        self.linear = FakeLinear(_Matrix(layer.weight.flatten(1), layer.bias), weights, inputs)

    @property
    def weight(self) -> Tensor:
        """The weights, where models ask their layers for the dtype."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-2) if self.flat else x
        sizes = [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, dilation, pad, stride in zip(
                x.shape[-2:], self.kernel, *self.geometry.values(), strict=True
            )
        ]
        patches = nnf.unfold(x, self.kernel, **self.geometry).transpose(1, 2)
        y = self.linear(patches).transpose(1, 2).unflatten(-1, sizes)
        return y.squeeze(-2) if self.flat else y


class FakeConvTranspose(nn.Module):
    """A ConvTranspose2d as a product over the input channels, then overlapping sums."""

    def __init__(
        self, layer: nn.ConvTranspose2d, weights: Quantizer, inputs: Quantizer | None
    ) -> None:
        super().__init__()
        assert layer.groups == 1
        assert layer.output_padding == (0, 0)
        self.layer = layer
        self.linear = FakeLinear(_Matrix(layer.weight.flatten(1).T, None), weights, inputs)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        sizes = [
            (size - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1
            for size, stride, pad, dilation, kernel in zip(
                x.shape[-2:],
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.kernel_size,
                strict=True,
            )
        ]
        columns = self.linear(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        y = nnf.fold(columns, sizes, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return y if layer.bias is None else y + layer.bias.view(-1, 1, 1)


class _Matrix(nn.Module):
    """A weight [out, in] and a bias, as a Linear has them."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias


_REPLACEMENTS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: FakeLinear,
    Conv1D: FakeLinear,
    nn.Conv1d: FakeConv,
    nn.Conv2d: FakeConv,
    nn.ConvTranspose2d: FakeConvTranspose,
}


def quantize_model(
    model: nn.Module, weights: str, inputs: str = "", skip: tuple[str, ...] = ()
) -> nn.Module:
    """Return a copy of a model whose Linears and convolutions round their weights and inputs.

    Args:
        model: The model; it is left as it is.
        weights: The quantizer of weights, as text.
        inputs: The quantizer of inputs, as text; empty: inputs are not rounded.
        skip: Full names of layers to leave as they are.
    """
    result = copy.deepcopy(model).eval()
    weight_quantizer = Quantizer.parse(weights)
    input_quantizer = Quantizer.parse(inputs) if inputs else None
    for name, layer in list(result.named_modules()):
        make = _REPLACEMENTS.get(type(layer))
        if make is None or name in skip:
            continue
        parent, _, child = name.rpartition(".")
        setattr(result.get_submodule(parent), child, make(layer, weight_quantizer, input_quantizer))
    return result
