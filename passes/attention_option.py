"""The option for attention, one text: ``compile(attention=)`` and ``--attention``."""

from __future__ import annotations

import difflib
from typing import Final

from fpcompiler.errors import OptionError
from fpcompiler.passes.base import Pass
from fpcompiler.passes.quantize_attention import QuantizeAttention
from fpcompiler.passes.quantize_cache import QuantizeCache

PARTS: Final = ("qkv", "weights", "cache")
"""What can be quantized: queries, keys and values; weights after softmax; the stored cache."""


def attention_passes(text: str) -> tuple[Pass, ...]:
    """Return the passes that the option stands for.

    Args:
        text: An operand, for queries, keys and values (``f8E4M3FN@token:f32``), or parts with an
            operand each, separated by commas: ``qkv=OPERAND,weights=OPERAND,cache=OPERAND``.

    Raises:
        FormatError: If an operand means nothing.
        OptionError: If a part is unknown, named twice or empty.
        PassError: If the operand cannot be one of a cache.
    """
    parts = _parts(text)
    passes: list[Pass] = []
    if "cache" in parts:
        # First: what comes from a quantized cache is not quantized again.
        passes.append(QuantizeCache(operand=parts["cache"]))
    if "qkv" in parts or "weights" in parts:
        operand, weights = parts.get("qkv", ""), parts.get("weights", "")
        passes.append(QuantizeAttention(operand=operand, weights=weights))
    return tuple(passes)


def _parts(text: str) -> dict[str, str]:
    if "=" not in text:
        return {"qkv": text}
    parts: dict[str, str] = {}
    for item in text.split(","):
        name, _, operand = (word.strip() for word in item.partition("="))
        if name not in PARTS:
            near = difflib.get_close_matches(name, PARTS, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise OptionError(f"attention: there is no part {name!r}. {hint}{_FORMS}")
        if name in parts or not operand:
            problem = "is given twice" if name in parts else "has no operand"
            raise OptionError(f"attention: the part {name} {problem}. {_FORMS}")
        parts[name] = operand
    return parts


_FORMS: Final = (
    "Write one operand for queries, keys and values (f8E4M3FN@token:f32), or some of "
    "qkv=OPERAND,weights=OPERAND,cache=OPERAND."
)
