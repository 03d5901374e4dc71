"""Kernels for Hopper whose weights stay in four bits until they are in registers.

``instance`` says which layers they compute, ``emit`` puts the headers beside it together.
"""

from fpcompiler.codegen.hopper.emit import emit
from fpcompiler.codegen.hopper.instance import (
    MOST_K,
    PackedGemm,
    describe,
    packed_gemm,
    parse_instance,
)

__all__ = ["PackedGemm", "packed_gemm", "describe", "parse_instance", "emit", "MOST_K"]
