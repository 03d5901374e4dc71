"""Calibration data streams through a graph, piece by piece; what must last is kept on disk."""

from fpcompiler.streams.results import Result, Results
from fpcompiler.streams.segments import Environment, Segments
from fpcompiler.streams.spill import Spill

__all__ = ["Environment", "Segments", "Spill", "Result", "Results"]
