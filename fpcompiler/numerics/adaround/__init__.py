"""Learned rounding: AdaRound for floating-point formats, with scales that are given."""

from fpcompiler.numerics.adaround.layer import LayersResult, round_layers
from fpcompiler.numerics.adaround.options import Ended, RoundOptions
from fpcompiler.numerics.adaround.soft import Parametrization, SoftWeight
from fpcompiler.numerics.adaround.unit import Forward, Samples, UnitResult, round_unit

__all__ = [
    "round_unit",
    "UnitResult",
    "Forward",
    "Samples",
    "round_layers",
    "LayersResult",
    "RoundOptions",
    "Ended",
    "SoftWeight",
    "Parametrization",
]
