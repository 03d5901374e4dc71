"""What is predicted: a product of a layer, and its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fpcompiler.operand import Operand

SLOWER: Final = 0.95
"""A layer counts as slower than bf16 below this part of its speed; models are no better."""


@dataclass(frozen=True)
class LayerCall:
    """One product ``[M, K] x [N, K]``.

    Attributes:
        m: Rows of activations: tokens.
        n: Output channels.
        k: Input channels.
        weight: The weights' operand.
        activation: The activations' operand; None for 16 bits.
        together: Outputs of each layer that reads the same quantized activations, itself included:
            a GPU multiplies them as one (``runtime/cuda/joined.py``). Empty: it is alone.
    """

    m: int
    n: int
    k: int
    weight: Operand
    activation: Operand | None
    together: tuple[int, ...] = ()

    @property
    def weight_bytes(self) -> float:
        """Bytes of the packed weight with its scales."""
        return self.n * self.k * self.weight.bits_per_value(self.k) / 8

    @property
    def operations(self) -> int:
        """Products and sums."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Prediction:
    """Times that a layer is predicted to take.

    Attributes:
        microseconds: Quantized, with the quantizing of its activations.
        bf16_microseconds: As a product of bf16.
    """

    microseconds: float
    bf16_microseconds: float

    @property
    def speed(self) -> float:
        """How many times as fast as in bf16."""
        return self.bf16_microseconds / self.microseconds

    @property
    def is_slower(self) -> bool:
        """Whether that is less than :data:`SLOWER`."""
        return self.speed < SLOWER
