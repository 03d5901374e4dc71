"""Results side by side: the ratio is always compiled over original; the loss has a direction."""

import pytest

from fpcompiler.errors import OptionError
from fpcompiler.evaluation import Direction, Recovery, Result, recoveries


def result(value: float, direction: Direction = Direction.HIGHER, count: int = 10) -> Result:
    return Result({"score": value}, direction, count, "items")


@pytest.mark.parametrize(
    ("direction", "original", "compiled", "ratio", "loss"),
    [
        (Direction.HIGHER, 0.8, 0.6, 0.75, 0.25),
        (Direction.HIGHER, 0.8, 0.9, 1.125, -0.125),
        (Direction.LOWER, 20.0, 21.0, 1.05, 0.05),
        (Direction.LOWER, 20.0, 15.0, 0.75, -0.25),
    ],
)
def test_ratio_and_loss(direction, original, compiled, ratio, loss) -> None:
    (row,) = recoveries(result(original, direction), result(compiled, direction))
    assert row == Recovery("score", direction, original, compiled)
    assert row.ratio == pytest.approx(ratio)
    assert row.loss == pytest.approx(loss)


@pytest.mark.parametrize("original", [0.0, -0.3])
def test_there_is_no_ratio_to_nothing(original) -> None:
    row = Recovery("score", Direction.LOWER, original, 0.5)
    assert (row.ratio, row.loss) == (None, None)


@pytest.mark.parametrize(
    "other",
    [
        result(1.0, Direction.LOWER),
        result(1.0, count=11),
        Result({"other": 1.0}, Direction.HIGHER, 10, "items"),
        Result({"score": 1.0}, Direction.HIGHER, 10, "tokens"),
    ],
)
def test_results_of_different_tasks_are_refused(other) -> None:
    with pytest.raises(OptionError, match="different tasks"):
        recoveries(result(1.0), other)
