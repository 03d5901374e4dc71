"""JSON members: reading with limits, and in the only form that is written."""

from __future__ import annotations

import json
from typing import Any

from fpcompiler.artifact.container import Buffer
from fpcompiler.artifact.damage import DamagedFileError


def parse(data: Buffer, what: str, limit: int) -> dict[str, Any]:
    """Return the JSON object in some bytes.

    Raises:
        DamagedFileError: If there are more bytes than ``limit``, or they are not one JSON object
            with distinct keys.
    """
    if len(data) > limit:
        raise DamagedFileError(
            f"{what} has {len(data)} bytes, more than the {limit} that one can need: the file is "
            "damaged or not from fpcompiler."
        )
    try:
        value = json.loads(bytes(data), object_pairs_hook=_distinct, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{what} is no JSON that fpcompiler writes: {error}.") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{what} is not a JSON object: the file is damaged.")
    return value


def dump(value: object) -> bytes:
    """Return the bytes of a JSON value; the same value always gives the same bytes."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key is there twice")
    return entries


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")
