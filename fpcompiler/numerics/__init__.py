"""The arithmetic of quantization: tensors in, tensors out; on CPU and CUDA, without a graph."""

from fpcompiler.numerics.clip import clip
from fpcompiler.numerics.given import quantize_with, quantize_within
from fpcompiler.numerics.metrics import cosine, max_error, sqnr_db
from fpcompiler.numerics.packing import decode_packed, pack, packed_bytes, unpack
from fpcompiler.numerics.rounding import decode, encode, round_to
from fpcompiler.numerics.scaling import (
    dequantize,
    dequantize_packed,
    expand_scale,
    quantize,
    quantize_packed,
)

__all__ = [
    "round_to",
    "encode",
    "decode",
    "pack",
    "unpack",
    "packed_bytes",
    "decode_packed",
    "clip",
    "quantize",
    "quantize_packed",
    "quantize_with",
    "quantize_within",
    "dequantize",
    "dequantize_packed",
    "expand_scale",
    "sqnr_db",
    "cosine",
    "max_error",
]
