"""The weights of a model that is partly rounded, decoded when they are read first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fpcompiler.numerics import dequantize, quantize_with, unpack
from fpcompiler.operand import Operand


@dataclass(frozen=True)
class Rounding:
    """How a weight is rounded.

    Attributes:
        layer: Named in errors.
        operand: Element format and scale levels.
        scales: Of each level.
    """

    layer: str
    operand: Operand
    scales: tuple[Tensor, ...]


class RoundedWeights(Mapping[str, Tensor]):
    """The values of all weights: with the codes that were learned, or rounded to nearest.

    Args:
        module: Has the weights as attributes.
        rounding: Of each attribute.
        device: Where the values are wanted.
    """

    def __init__(
        self, module: fx.GraphModule, rounding: Mapping[str, Rounding], device: torch.device
    ) -> None:
        self._module = module
        self._rounding = rounding
        self._device = device
        self._packed: dict[str, Tensor] = {}
        self._decoded: dict[str, Tensor] = {}

    def learned(self, name: str, packed: Tensor) -> None:
        """Take the codes that were learned for a weight, and keep no values any longer."""
        self._packed[name] = packed
        self.forget()

    def forget(self) -> None:
        """Keep no values any longer: those of one unit at a time are enough."""
        self._decoded.clear()

    def original(self, name: str) -> Tensor:
        """Return a weight before it is rounded."""
        tensor = getattr(self._module, name)
        assert isinstance(tensor, Tensor)
        return tensor.to(self._device)

    def scales(self, name: str) -> tuple[Tensor, ...]:
        """Return the scales of a weight."""
        return tuple(scale.to(self._device) for scale in self._rounding[name].scales)

    def __getitem__(self, name: str) -> Tensor:
        """Return the values of a weight, in its own dtype.

        They are kept until :meth:`forget`, since each batch reads them.
        """
        if name not in self._decoded:
            self._decoded[name] = self._decode(name)
        return self._decoded[name]

    def _decode(self, name: str) -> Tensor:
        rounding, scales = self._rounding[name], self.scales(name)
        operand, value = rounding.operand, self.original(name)
        if name in self._packed:
            packed = self._packed[name].to(self._device)
            codes = unpack(packed, operand.format.storage_bits, value.shape[-1])
        else:
            codes = quantize_with(value, scales, operand, layer=rounding.layer)
        return dequantize(codes, scales, operand).to(value.dtype)

    def __contains__(self, name: object) -> bool:
        """Return whether an attribute is a weight that is rounded."""
        return name in self._rounding

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._rounding)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._rounding)
