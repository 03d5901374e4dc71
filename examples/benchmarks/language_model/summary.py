"""What a record of ``llm.py`` says: ratios within a round, and memory that the model takes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any


def ratio(report: Mapping[str, Any], slow: str, fast: str, key: str) -> float | None:
    """Return how many times faster one runtime is than another: the median over rounds."""
    pairs = [(r[slow][key], r[fast][key]) for r in report["rounds"] if {slow, fast} <= r.keys()]
    return statistics.median(slower / faster for slower, faster in pairs) if pairs else None


def grown(report: Mapping[str, Any], name: str) -> int:
    """Return how far the memory of a process went above what it was before the model came."""
    own = report["memory"][name]
    return int(own["after"]["peak"] - own["before"]["resident"])
