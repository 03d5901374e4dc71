"""Attention of a few queries over a cache of keys and values, in CUDA C++ of our own.

===================  ===============================================================
:mod:`.emit`         the source of a library
:mod:`.problems`     which kernels a plan can use
``steps.h``          what a warp does: flash decoding on tensor cores
``attend.h``         the kernel: what warps and blocks have is joined
``warps.h``          the instructions that it needs beside those of ``codegen/cuda``
``attention.h``      the C interface between libraries and operators
===================  ===============================================================
"""

from fpcompiler.codegen.attention.emit import ARCHS, attend_kernels, parse
from fpcompiler.codegen.attention.problems import attend_problems

__all__ = ["ARCHS", "attend_kernels", "attend_problems", "parse"]
