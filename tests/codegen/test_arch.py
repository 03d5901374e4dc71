"""Architectures of nvcc and the targets that they belong to."""

import pytest

from fpcompiler.codegen.arch import ARCHS, arch
from fpcompiler.errors import TargetError
from fpcompiler.target import TARGETS


def test_every_gpu_target_has_an_architecture_of_its_own_name() -> None:
    assert {name for name in TARGETS if name.startswith("sm_")} <= set(ARCHS)
    assert all(row.target in TARGETS and row.facts.name == row.target for row in ARCHS.values())


def test_a_family_covers_the_capabilities_of_its_members() -> None:
    for family, members in (
        ("sm_100f", ("sm_100a", "sm_103a")),
        ("sm_120f", ("sm_120a", "sm_121a")),
    ):
        covered = {c for name in members for c in arch(name).capabilities}
        assert set(arch(family).capabilities) == covered
        assert {arch(name).target for name in members} == {arch(family).target}


def test_suffix() -> None:
    assert arch("sm_103a").suffix == "103a"


@pytest.mark.parametrize("name", ["sm_100", "cpu", "sm_89"])
def test_an_unknown_name_lists_the_known_ones(name) -> None:
    with pytest.raises(TargetError, match=r"sm_100a, sm_100f, sm_103a, sm_120a"):
        arch(name)
