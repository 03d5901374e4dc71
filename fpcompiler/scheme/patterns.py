"""Patterns that name layers, and the quoting of them in the text of a scheme."""

from __future__ import annotations

import fnmatch
import re
from typing import Final

from fpcompiler.errors import FormatError
from fpcompiler.scheme.roles import ROLE_PREFIX, Role, parse_role

PREFIXES: Final = ("re", "role")
"""What stands before the colon of a pattern that is no glob."""

_RESERVED: Final = re.compile(r"[,;:|='\s]")


def pattern_matches(pattern: str, path: str, role: str = Role.OTHER) -> bool:
    """Return whether a pattern of a rule or of ``skip`` matches a layer.

    Args:
        pattern: A glob for the whole path or its last part (``*`` crosses dots), ``re:`` and a
            regular expression for the whole path, or ``role:`` and the name of a role.
        path: A module path such as ``model.layers.0.mlp.down_proj``.
        role: What the layer is in its model, see :class:`fpcompiler.scheme.Role`.
    """
    if pattern.startswith(ROLE_PREFIX):
        return pattern.removeprefix(ROLE_PREFIX) == role
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    last = path.rpartition(".")[2]
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(last, pattern)


def check_pattern(pattern: str) -> None:
    """Check that a pattern can match something.

    Raises:
        FormatError: If it is empty, a regular expression that does not compile, or an unknown role.
    """
    if not pattern.strip():
        raise FormatError("a pattern cannot be empty; write * for every layer.")
    if pattern.startswith(ROLE_PREFIX):
        parse_role(pattern.removeprefix(ROLE_PREFIX))
    if not pattern.startswith("re:"):
        return
    try:
        re.compile(pattern[3:])
    except re.error as error:
        raise FormatError(f"{pattern!r} is no regular expression: {error}.") from None


def quote(pattern: str) -> str:
    """Return a pattern as the text of a scheme has it, in quotes if it needs them."""
    prefix, colon, rest = pattern.partition(":")
    body = rest if colon and prefix in PREFIXES else pattern
    plain = body and body not in ("none", *PREFIXES) and not _RESERVED.search(body)
    return pattern if plain else "'" + pattern.replace("'", "''") + "'"


def unquote(text: str) -> str:
    """Return the pattern that a quoted or plain text stands for.

    Raises:
        FormatError: If there is a quote anywhere but around the whole text.
    """
    if "'" not in text:
        return text
    match = re.fullmatch(r"'((?:[^']|'')*)'", text)
    if not match:
        raise FormatError(f"{text}: quotes stand around a whole pattern; write '' for one inside.")
    return match[1].replace("''", "'")


def split(text: str, separator: str) -> list[str]:
    """Split at every separator outside quotes, and strip the parts."""
    parts, quoted = [""], False
    for char in text:
        quoted ^= char == "'"
        if char == separator and not quoted:
            parts.append("")
        else:
            parts[-1] += char
    if quoted:
        raise FormatError(f"{text!r}: a quote is not closed.")
    return [part.strip() for part in parts]
