"""CUDA C++ for what is not a product of matrices."""

from fpcompiler.codegen.cuda.quantize import QuantizeSource, quantize_source

__all__ = ["quantize_source", "QuantizeSource"]
