"""What a layer is in its model: the names by which rules choose layers without naming them."""

from __future__ import annotations

import difflib
import enum
from typing import Final

from fpcompiler.errors import FormatError

ROLE_PREFIX: Final = "role:"
"""How a pattern begins that stands for all layers of a role."""


class Role(enum.StrEnum):
    """What a layer is in its model; ``passes/roles.py`` finds it from the graph alone."""

    FFN_IN = "ffn-in"
    """Its output goes through GELU, SiLU or ReLU, or is the other factor of that product."""
    FFN_OUT = "ffn-out"
    """It reads what a ``ffn-in`` layer gives after the activation."""
    QKV = "qkv"
    """Its output is the query, key or value of attention, or several of them."""
    ATTENTION_OUT = "attention-out"
    """It reads the output of attention."""
    MODULATION = "modulation"
    """It turns a condition without tokens into shifts, scales or gates of all tokens (adaLN)."""
    EMBEDDING = "embedding"
    """It makes tokens of an input, or a condition: patches, timesteps, labels, tables."""
    HEAD = "head"
    """Its output, after all blocks, is a result of the model."""
    OTHER = "other"
    """None of these."""


def parse_role(name: str) -> Role:
    """Return the role of a name.

    Raises:
        FormatError: If there is no such role; the message lists all and the nearest one.
    """
    if name in set(Role):
        return Role(name)
    near = difflib.get_close_matches(name.lower().replace("_", "-"), list(Role), n=1, cutoff=0.5)
    hint = f"Did you mean role:{near[0]}? " if near else ""
    raise FormatError(f"There is no role {name!r}. {hint}Roles: {', '.join(Role)}.")
