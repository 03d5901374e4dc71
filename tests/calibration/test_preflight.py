"""What is said before long work starts."""

from __future__ import annotations

import time

import pytest

from fpcompiler.calibration import Calibration, input_groups
from fpcompiler.calibration.preflight import Preflight
from tests.calibration.runs import CPU, keep, visit
from tests.models import normal
from tests.passes.tiny import Mlp, tiny
from tests.programs import quantized


def test_the_work_is_predicted_from_its_first_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpcompiler.calibration.calibration._WORTH_TELLING", 0.05)
    program = quantized(tiny(Mlp), normal(2, 32), scheme="w4a6,skip=none")
    said: list[str] = []

    def slow(group, statistics):  # type: ignore[no-untyped-def]
        time.sleep(0.03)
        return keep(group, statistics)

    visit(program, Calibration([(normal(8, 32),)], device=CPU, report=said.append), slow, "slow{}")
    assert len(said) == 2
    assert "beside the model" in said[0]
    assert said[1].startswith("slow: 3 groups of layers: about 1 s of work")


def test_work_grows_with_the_weights() -> None:
    program = quantized(tiny(Mlp), normal(2, 32), scheme="w4a6,skip=none")
    with program.context():
        groups = input_groups(program)
        assert [group.weights for group in groups] == [32 * 64, 64 * 32, 32 * 8]
        assert Preflight.work_seconds(groups, 2.0) == pytest.approx(2 * (1 + 1 + 1 / 8))


def test_short_work_is_not_announced() -> None:
    program = quantized(tiny(Mlp), normal(2, 32), scheme="w4a6,skip=none")
    said: list[str] = []
    visit(program, Calibration([(normal(8, 32),)], device=CPU, report=said.append))
    assert len(said) == 1
