"""The text of a scheme, read into a recipe."""

from __future__ import annotations

from typing import Any

from fpcompiler.errors import FormatError
from fpcompiler.scheme.patterns import PREFIXES, split, unquote


def recipe_of(text: str) -> dict[str, Any]:
    """Return the recipe that says the same as the text of a scheme.

    Raises:
        FormatError: If the text is not made of clauses and rules. Names and operands in it are
            checked when the recipe is used.
    """
    head, *rules = split(text, ";")
    return {**_clauses(head), "rules": [_rule_clauses(rule) for rule in rules if rule]}


def _clauses(text: str) -> dict[str, Any]:
    """Return the recipe of ``w=...,a=...,skip=...`` or of a preset's name followed by such."""
    keys = {"w": "weights", "a": "activations", "skip": "skip"}
    recipe: dict[str, Any] = {}
    for clause in split(text, ","):
        key, equals, value = clause.partition("=")
        name = keys.get(key.strip()) if equals else "scheme"
        if name is None:
            raise FormatError(f"{clause!r}: a scheme has w=, a= and skip=, not {key.strip()!r}.")
        if name in recipe or (name == "scheme" and recipe):
            raise FormatError(
                f"{clause!r} in {text!r}: one name, first, and each of w, a, skip once."
            )
        recipe[name] = _patterns(value) if name == "skip" else (value if equals else clause).strip()
    return recipe


def _patterns(text: str) -> list[str]:
    return [] if text.strip() == "none" else [unquote(part) for part in split(text, "|")]


def _rule_clauses(text: str) -> dict[str, Any]:
    parts = split(text, ":")
    head = 2 if parts[0] in PREFIXES else 1
    if len(parts) <= head:
        raise FormatError(f"{text!r} is no rule; write PATTERN: skip or PATTERN: w=...,a=...")
    pattern, body = ":".join(parts[:head]), ":".join(parts[head:])
    clauses = {"skip": True} if body == "skip" else _clauses(body)
    if clauses.get("skip", True) is not True:
        raise FormatError(f"{text!r}: a rule is either PATTERN: skip or has w= and a= only.")
    return {"match": unquote(pattern), **clauses}
