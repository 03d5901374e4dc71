"""The C interface of programs (csrc/program.h): structures and the types of the functions."""

from __future__ import annotations

import ctypes
import enum
from typing import Final

from fpcompiler.native.linear import Activations, Producer, Rows, Weights

RANK: Final = 5
"""Axes of a view."""

INPUTS: Final = 4
"""Views that an operation may read."""

OUT_OF_RANGE: Final = 3
"""What an index that is none gives, beside the statuses of ``FpcStatus``."""


class Kind(enum.IntEnum):
    """What an operation does: ``FpcKind``."""

    COPY = 0
    ADD = 1
    SUB = 2
    MUL = 3
    SCALE = 4
    NEG = 5
    INDEX_COPY = 6
    GATHER_ROWS = 7
    ATTENTION = 8
    PREPARE = 9
    MULTIPLY = 10
    PRODUCE = 11
    PREPARE_CODES = 12


class View(ctypes.Structure):
    """``FpcView``."""

    _fields_ = (
        ("base", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * RANK),
        ("strides", ctypes.c_int64 * RANK),
        ("type", ctypes.c_int64),
    )


class Operation(ctypes.Structure):
    """``FpcOperation``."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("scalar", ctypes.c_float),
        ("flag", ctypes.c_int32),
        ("integers", ctypes.c_int64 * 2),
        ("weights", ctypes.POINTER(Weights)),
        ("activations", ctypes.POINTER(Activations)),
        ("producer", ctypes.POINTER(Producer)),
        ("rows", Rows * 2),
        ("has_rows", ctypes.c_int32 * 2),
        ("y", View),
        ("x", View * INPUTS),
    )


def declare(functions: ctypes.CDLL) -> None:
    """Give the functions of programs their types."""
    functions.fpc_run.restype = ctypes.c_int32
    functions.fpc_run.argtypes = (
        ctypes.POINTER(Operation),
        ctypes.c_int64,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.POINTER(ctypes.c_int64),
        ctypes.POINTER(ctypes.c_int64),
    )
