"""Targets as users name them: one for the plan, and GPUs beside it."""

from __future__ import annotations

import pytest
import torch

from fpcompiler.codegen.targets import arch_for, kept_on, split_targets
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


@pytest.mark.parametrize(
    ("capability", "name"),
    [((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((10, 3), "sm_103a"), ((12, 1), "sm_121a")],
)
def test_cuda_is_the_gpu_of_this_machine(monkeypatch, capability, name) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert arch_for(capability) == name
    assert split_targets("cuda") == ("cpu", (name,))
    assert split_targets(["reference", "cuda"]) == ("reference", (name,))


def test_cuda_without_a_gpu_that_kernels_are_for(monkeypatch) -> None:
    with pytest.raises(
        TargetError, match=r"8\.0, and there are kernels for 9\.0, 10\.0.*reference"
    ):
        arch_for((8, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetError, match=r"torch finds none here\. Name the GPU .*sm_90a"):
        split_targets("cpu,cuda")


@pytest.mark.parametrize(
    ("target", "default", "forced"),
    [
        ("sm_90a", ("sm_90a",), ("sm_90a",)),
        ("cpu,sm_90a", (), ("sm_90a",)),
        (["sm_90a", "sm_100a"], (), ("sm_90a", "sm_100a")),
        ("sm_100a", (), ("sm_100a",)),
        (["sm_103a", "sm_100f", "sm_121a"], (), ("sm_100a", "sm_120a")),
        ("reference,sm_120a", (), ("sm_120a",)),
    ],
)
def test_layers_are_kept_by_default_where_only_measured_gpus_are_named(
    target, default, forced
) -> None:
    assert kept_on(target, None) == default
    assert kept_on(target, True) == forced
    assert kept_on(target, False) == ()


def test_nothing_is_compared_without_a_gpu() -> None:
    assert kept_on("cpu", None) == ()
    with pytest.raises(OptionError, match=r"target='cpu' names none.*sm_90a, sm_100a, sm_120a"):
        kept_on("cpu", True)


def test_the_gpu_of_this_machine_is_compared_with_too(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert kept_on("cuda", None) == ("sm_90a",)
