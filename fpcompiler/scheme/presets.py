"""The named schemes, one row each, and the layers that no scheme quantizes by default."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fpcompiler.errors import FormatError


@dataclass(frozen=True)
class Preset:
    """A named scheme.

    Attributes:
        name: Its name.
        weight: The operand of weights.
        activation: The operand of activations; ``none`` leaves them as they are.
        note: What it is for.
        skip: Patterns of layers that stay in high precision; None: the usual output heads.
        rules: Exceptions: a pattern, and the operand of the weights that it matches.
    """

    name: str
    weight: str
    activation: str
    note: str
    skip: tuple[str, ...] | None = None
    rules: tuple[tuple[str, str], ...] = ()


def _fp4dit(name: str, weight: str, activation: str, note: str) -> Preset:
    """A scheme of FP4DiT (arXiv 2503.15465): powers of two where a GELU follows.

    What makes and applies the condition and what reads and writes pictures stays as it is.
    """
    skip = ("role:modulation", "role:embedding", "role:head")
    rules = (("role:ffn-in", f"f4E3M0FN@{_GROUP}"),)
    return Preset(name, f"{weight}@{_GROUP}", f"{activation}@token:f32", note, skip, rules)


_ROW_BLOCK = "f4E2M1FN@row:f32/block32:f8E8M0FNU"
_ROW = "f4E2M1FN@row:f32"
_NV = "f4E2M1FN@tensor:f32/block16:f8E4M3FN"
_MX = "block32:f8E8M0FNU:floor"  # floor is the scale rule of OCP MX
_GROUP = "block128:f32"

_DIT = "`role:ffn-in` in E3M0"

_PRESETS: Final = (
    Preset("w4a16", _ROW_BLOCK, "none", "weights only, for models bound by weight traffic"),
    Preset("w4a8", _ROW_BLOCK, "f8E4M3FN@block32:f8E8M0FNU", "activations in 8 bits"),
    Preset("w4a6", _ROW_BLOCK, "f6E2M3FN@block32:f8E8M0FNU", "the default"),
    Preset(
        "w4a4", _ROW_BLOCK, "f4E2M1FN@block32:f8E8M0FNU", "the format of full-rate FP4 hardware"
    ),
    Preset("w4a8-row", _ROW, "f8E4M3FN@token:f32", "scales only at the edges of the product"),
    Preset("w4a6-row", _ROW, "f6E2M3FN@token:f32", "as w4a8-row; code sums exact for K <= 16384"),
    Preset("w4a4-row", _ROW, "f4E2M1FN@token:f32", "as w4a8-row; code sums exact for K <= 16384"),
    Preset("nvfp4", _NV, _NV, "NVIDIA's layout"),
    Preset("mxfp4", f"f4E2M1FN@{_MX}", f"f4E2M1FN@{_MX}", "OCP Microscaling"),
    Preset("mxfp6", f"f6E2M3FN@{_MX}", f"f6E2M3FN@{_MX}", "OCP Microscaling, the E2M3 variant"),
    Preset("mxfp8", f"f8E4M3FN@{_MX}", f"f8E4M3FN@{_MX}", "OCP Microscaling, the E4M3 variant"),
    Preset("w_mxfp4_a_mxfp6_e2m3", f"f4E2M1FN@{_MX}", f"f6E2M3FN@{_MX}", "AMD Quark's name"),
    Preset("w_mxfp4_a_mxfp6_e3m2", f"f4E2M1FN@{_MX}", f"f6E3M2FN@{_MX}", "AMD Quark's name"),
    _fp4dit("fp4dit", "f4E2M1FN", "f6E2M3FN", f"FP4DiT W4A6 for PixArt-alpha, Hunyuan; {_DIT}"),
    _fp4dit("fp4dit-w4a8", "f4E2M1FN", "f8E3M4FN", f"FP4DiT W4A8; {_DIT}"),
    _fp4dit("fp4dit-sigma", "f4E1M2FN", "f6E2M3FN", f"FP4DiT W4A6 for PixArt-Sigma; {_DIT}"),
    _fp4dit("fp4dit-sigma-w4a8", "f4E1M2FN", "f8E3M4FN", f"FP4DiT W4A8, PixArt-Sigma; {_DIT}"),
)

PRESETS: Final[Mapping[str, Preset]] = MappingProxyType({row.name: row for row in _PRESETS})
"""Every named scheme by name."""

DEFAULT_SKIP: Final = (
    "lm_head", "*lm_head.decoder", "*predictions.decoder", "embed_out", "classifier", "score",
    "qa_outputs", "head", r"re:(\D*\.)?proj_out", "*final_layer.linear",
)  # fmt: skip
"""The output heads of common models. A ``proj_out`` inside a numbered block is no head."""


def find_preset(name: str) -> Preset:
    """Return the row of a name, in any case and with ``_`` for ``-``.

    Raises:
        FormatError: If there is no such name; the message lists the nearest ones.
    """
    wanted = name.strip().lower()
    row = PRESETS.get(wanted) or PRESETS.get(wanted.replace("_", "-"))
    if row is not None:
        return row
    near = difflib.get_close_matches(wanted, list(PRESETS), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise FormatError(
        f"There is no scheme {name!r}. {hint}Schemes: {', '.join(PRESETS)}; or write "
        "w=FORMAT@SCALE,a=FORMAT@SCALE, for instance w=f4E2M1FN@row:f32,a=f6E2M3FN@token:f32."
    )
