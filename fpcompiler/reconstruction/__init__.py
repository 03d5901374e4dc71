"""Learned rounding of a whole graph: unit after unit, each against what the original model does.

Works on ``torch.fx`` graphs and needs no compiler, so that it runs wherever PyTorch does.
"""

from fpcompiler.reconstruction.fake_quantize import fake_quantize
from fpcompiler.reconstruction.job import load_walk, save_walk
from fpcompiler.reconstruction.units import Unit, find_units
from fpcompiler.reconstruction.values import Rounding
from fpcompiler.reconstruction.walk import Settings, Walk

__all__ = [
    "Rounding",
    "Settings",
    "Unit",
    "Walk",
    "fake_quantize",
    "find_units",
    "load_walk",
    "save_walk",
]
