"""Targets as users name them: one for the plan, and GPUs beside it."""

from __future__ import annotations

import pytest

from fpcompiler.codegen.targets import split_targets
from fpcompiler.errors import OptionError, TargetError


@pytest.mark.parametrize(
    ("given", "plan", "archs"),
    [
        ("cpu", "cpu", ()),
        ("reference", "reference", ()),
        ("sm_100a", "cpu", ("sm_100a",)),
        ("cpu, sm_100a,sm_120f", "cpu", ("sm_100a", "sm_120f")),
        (["sm_120a", "reference"], "reference", ("sm_120a",)),
        (("sm_90a",), "cpu", ("sm_90a",)),
    ],
)
def test_one_for_the_plan_and_gpus_beside_it(given, plan, archs) -> None:
    assert split_targets(given) == (plan, archs)


@pytest.mark.parametrize(
    "given", ["", [], "cpu,cpu", ["sm_100a", "sm_100a"], "cpu,", "cpu,reference"]
)
def test_what_names_no_targets_is_refused(given) -> None:
    with pytest.raises((OptionError, TargetError)):
        split_targets(given)


def test_an_unknown_one_is_named_with_what_there_is() -> None:
    with pytest.raises(TargetError, match=r"sm_101a.*Did you mean sm_120a") as caught:
        split_targets("cpu,sm_101a")
    assert "sm_121a" in caught.value.__notes__[0]
