"""Kernels for NVIDIA GPUs, from libraries that were compiled before."""

from fpcompiler.runtime.cuda.problem import QuantizeProblem
from fpcompiler.runtime.cuda.quantize import Quantized, QuantizeLibrary

__all__ = ["QuantizeProblem", "QuantizeLibrary", "Quantized"]
