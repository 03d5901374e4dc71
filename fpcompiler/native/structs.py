"""Structures of the C interface (csrc/native.h) that several functions share."""

from __future__ import annotations

import ctypes


class Format(ctypes.Structure):
    """``FpcFormat``."""

    _fields_ = (
        ("mantissa_bits", ctypes.c_int32),
        ("magnitude_bits", ctypes.c_int32),
        ("min_exponent", ctypes.c_int32),
        ("max_exponent", ctypes.c_int32),
        ("max", ctypes.c_float),
    )


class OperandStruct(ctypes.Structure):
    """``FpcOperand``."""

    _fields_ = (
        ("element", Format),
        ("outer", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("block_scale", ctypes.c_int32),
        ("rounding", ctypes.c_int32),
        ("code_bits", ctypes.c_int32),
    )
