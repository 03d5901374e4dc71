"""What a walk says about time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reconstruction.graphs import (
    walk_of,
)


def test_the_report_says_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("fpcompiler.reconstruction.walk._WORTH_TELLING", 0.0)
    walk = walk_of(tmp_path, iterations=3)
    walk.run(lambda items, total, label: items, "round", told.append)
    (text,) = told
    assert text.startswith("round: 3 units: about ")
    assert text.endswith("left")
