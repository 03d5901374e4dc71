"""How each format stores a weight: one row says all that readers and writers need to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fpcompiler.numerics import packed_bytes
from fpcompiler.operand import Operand, ScaleLevel

NVFP4: Final = Operand.parse("f4E2M1FN@tensor:f32/block16:f8E4M3FN")
MXFP4: Final = Operand.parse("f4E2M1FN@block32:f8E8M0FNU:floor")
MXFP6: Final = Operand.parse("f6E2M3FN@block32:f8E8M0FNU:floor")
MXFP8: Final = Operand.parse("f8E4M3FN@block32:f8E8M0FNU:floor")


@dataclass(frozen=True)
class Layout:
    """How a format stores a quantized weight ``[N, K]``.

    Attributes:
        name: What compressed-tensors calls it in ``format``; of ModelOpt the ``quant_algo``.
        operand: What the weight is; how scales were rounded is not stored, and says nothing here.
        codes: Name of the tensor of codes within the layer: low nibble first, 6-bit codes as one
            little-endian stream, as :func:`fpcompiler.numerics.pack` packs them.
        codes_dtype, scale_dtype: Types as safetensors spells them.
        outer: Name of the scale of the tensor, or empty; fp32, one number.
        input_outer: Name of the static scale of the input's tensor, or empty.
        reciprocal: Whether these two are stored as one over the scale (compressed-tensors:
            ``2688 / amax``) or as the scale (ModelOpt: ``amax / 2688``).
    """

    name: str
    operand: Operand
    codes: str = "weight_packed"
    codes_dtype: str = "U8"
    scale_dtype: str = "U8"
    outer: str = ""
    input_outer: str = ""
    reciprocal: bool = False

    @property
    def block(self) -> ScaleLevel:
        """The level of blocks, which every format here has."""
        assert self.operand.block is not None
        return self.operand.block

    def codes_shape(self, n: int, k: int) -> tuple[int, int]:
        """Return the shape of the codes of a weight ``[n, k]``."""
        return n, packed_bytes(k, self.operand.format.storage_bits)

    def width(self, columns: int) -> int:
        """Return how many codes so many columns hold."""
        return columns * 8 // self.operand.format.storage_bits

    def tensors(self, is_static: bool) -> tuple[str, ...]:
        """Return the names of the tensors of a layer.

        Args:
            is_static: Whether its input has a static scale.
        """
        names = (self.codes, "weight_scale", self.outer, self.input_outer if is_static else "")
        return tuple(name for name in names if name)


COMPRESSED: Final = (
    Layout(
        "nvfp4-pack-quantized",
        NVFP4,
        scale_dtype="F8_E4M3",
        outer="weight_global_scale",
        input_outer="input_global_scale",
        reciprocal=True,
    ),
    Layout("mxfp4-pack-quantized", MXFP4),
    Layout("mxfp6-pack-quantized", MXFP6),
    Layout("mxfp8-quantized", MXFP8, codes="weight", codes_dtype="F8_E4M3"),
)
"""The formats of compressed-tensors (0.20) that hold floating-point blocks."""

MODELOPT: Final = Layout(
    "NVFP4",
    NVFP4,
    codes="weight",
    scale_dtype="F8_E4M3",
    outer="weight_scale_2",
    input_outer="input_scale",
)
"""NVFP4 as NVIDIA's Model Optimizer stores it."""

PARAMETERS: Final = (
    "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale",
    "weight_scale_2", "input_scale", "weight_zero_point", "input_zero_point", "weight_g_idx",
    "weight_shape", "pre_quant_scale", "k_scale", "v_scale", "q_scale", "output_scale",
)  # fmt: skip
"""Names that only tensors of quantization have."""


def same_values(a: Operand, b: Operand) -> bool:
    """Return whether codes and scales of one operand mean the same in the other.

    They do if the operands differ in nothing but the rounding of scales.
    """
    levels = [
        [(level.granularity, level.format, level.block) for level in operand.levels]
        for operand in (a, b)
    ]
    return a.format is b.format and levels[0] == levels[1]
