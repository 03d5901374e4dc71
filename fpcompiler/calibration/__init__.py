"""Calibration: data streams through the model, and work is done on what each layer sees of it."""

from fpcompiler.calibration.calibration import Calibration, parse_bytes
from fpcompiler.calibration.data import Call, bind_calls, calls, draw
from fpcompiler.calibration.gradients import SquaredGradients
from fpcompiler.calibration.groups import Group, input_groups
from fpcompiler.calibration.learnable import raise_learnable
from fpcompiler.calibration.once import run_once
from fpcompiler.calibration.statistics import InputStatistics

__all__ = [
    "Calibration",
    "Call",
    "bind_calls",
    "calls",
    "draw",
    "Group",
    "InputStatistics",
    "SquaredGradients",
    "input_groups",
    "parse_bytes",
    "raise_learnable",
    "run_once",
]
