"""The C interface of linear layers (csrc/native.h): structures and the types of the functions."""

from __future__ import annotations

import ctypes
import enum
from typing import Final

from fpcompiler.native.structs import OperandStruct


class Arithmetic(enum.IntEnum):
    """How products are summed: ``FpcArithmetic``."""

    INT8 = 0
    """Values of both operands are integers times a power of two; sums are exact."""
    BF16 = 1
    """bf16 holds the values of both operands; sums are fp32."""
    FLOAT32 = 2
    """Both are decoded to fp32."""


class Weights(ctypes.Structure):
    """``FpcWeights``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group", ctypes.c_int32),
        ("block_scale", ctypes.c_int32),
        ("scaled_inputs", ctypes.c_int32),
        ("least", ctypes.c_int32),
        ("most", ctypes.c_int32),
        ("arithmetic", ctypes.c_int32),
        ("code_bits", ctypes.c_int32),
        ("digits", ctypes.c_int32),
        ("offset", ctypes.c_int32),
        ("most_input", ctypes.c_int32),
        ("unit", ctypes.c_float),
        ("integers", ctypes.c_uint8 * 256),
        ("halves", ctypes.c_uint16 * 256),
        ("values", ctypes.c_float * 256),
        ("row_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("activation", ctypes.c_int32),
    )


class Activations(ctypes.Structure):
    """``FpcActivations``."""

    _fields_ = (
        ("operand", OperandStruct),
        ("quantized", ctypes.c_int32),
        ("integers", ctypes.c_int8 * 256),
        ("values", ctypes.c_float * 256),
    )


class Producer(ctypes.Structure):
    """``FpcProducer``."""

    _fields_ = (
        ("head", ctypes.c_int32),
        ("tail", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("weight_type", ctypes.c_int32),
        ("bias_type", ctypes.c_int32),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class Rows(ctypes.Structure):
    """``FpcRows``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("repeat", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


_SIZE: Final = ctypes.c_int64
_CODE: Final = ctypes.c_int32
_MEMORY: Final = ctypes.c_void_p


def declare(functions: ctypes.CDLL) -> None:
    """Give the functions of linear layers their types."""
    weights, activations = ctypes.POINTER(Weights), ctypes.POINTER(Activations)
    rows = ctypes.POINTER(Rows)
    table = {
        "fpc_weight_bytes": (_SIZE, (weights,)),
        "fpc_repack": (None, (weights, _MEMORY, _SIZE, _MEMORY, _SIZE, _MEMORY, _CODE)),
        "fpc_prepared_bytes": (_SIZE, (weights, _SIZE)),
        "fpc_prepare": (
            _CODE,
            (weights, activations, _MEMORY, _CODE, _SIZE, _SIZE, _MEMORY, _CODE, _CODE),
        ),
        "fpc_prepare_produced": (
            _CODE,
            (
                *(weights, activations, ctypes.POINTER(Producer), rows, rows),
                *(_MEMORY, _CODE, _SIZE, _SIZE, _MEMORY, _CODE, _CODE),
            ),
        ),
        "fpc_prepare_codes": (
            _CODE,
            (weights, activations, _MEMORY, _MEMORY, _MEMORY, _SIZE, _MEMORY, _CODE, _CODE),
        ),
        "fpc_multiply": (
            _CODE,
            (weights, _MEMORY, _SIZE, _MEMORY, _MEMORY, _CODE, _SIZE, _CODE, _CODE),
        ),
        "fpc_evaluate": (None, (_CODE, _MEMORY, _MEMORY, _SIZE, _CODE)),
    }
    for name, (result, arguments) in table.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
