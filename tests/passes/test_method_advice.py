"""What a user is told where a method could do nothing, and that nothing is said elsewhere."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fpcompiler
from tests.models import normal
from tests.passes.tiny import Mlp, tiny

DATA = [normal(80, 32, seed=i) for i in range(4)]
STATIC = "w=f4E2M1FN@row:f32,a=f4E2M1FN@tensor:f32"


def told(method: str, scheme: str, model: nn.Module | None = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fpcompiler.compile(model or tiny(Mlp), scheme, calibration=DATA, method=method)
    return [str(warning.message) for warning in caught if "The method" in str(warning.message)]


@pytest.mark.parametrize(
    ("method", "scheme", "advice"),
    [
        ("smooth", "w4a16", "for weights take gptq or rotate-gptq."),
        ("rotate", "w4a16", "for weights take rotate-gptq."),
        ("preshift", "w4a16", "such as a=f4E2M1FN@tensor:f32; else take rotate-gptq."),
        ("preshift", "w4a4", "such as a=f4E2M1FN@tensor:f32; else take rotate-gptq."),
        ("preshift-gptq", "w4a4", "such as a=f4E2M1FN@tensor:f32; else take rotate-gptq."),
        ("search", "w4a4,skip=*", "take gptq or rotate-gptq."),
    ],
)
def test_a_pass_that_changes_nothing_is_warned_of_once(
    method: str, scheme: str, advice: str
) -> None:
    (line,) = told(method, scheme)
    assert line.startswith(f"The method {method}: ")
    assert " changed nothing in this model" in line
    assert line.endswith(advice)


def test_the_published_search_is_the_search_where_no_weight_has_scales_per_row() -> None:
    (line,) = told("faithful", "w4a4")
    assert line.startswith("The method faithful is the same as search here: ")
    results = [
        fpcompiler.compile(tiny(Mlp), f"{STATIC}; down: w4a4", calibration=DATA, method=method)
        for method in ("faithful", "search")
    ]
    assert not torch.equal(results[0](DATA[0]), results[1](DATA[0]))


@pytest.mark.filterwarnings("ignore:The method faithful")
def test_what_the_warning_says_of_the_published_search_is_true() -> None:
    results = [
        fpcompiler.compile(tiny(Mlp), "w4a4", calibration=DATA, method=method)
        for method in ("faithful", "search")
    ]
    assert torch.equal(results[0](DATA[0]), results[1](DATA[0]))


@pytest.mark.parametrize(
    ("method", "scheme"),
    [("rtn", "w4a16"), ("gptq", "w4a16"), ("rotate-gptq", "w4a16"), ("rotate", "w4a4"),
     ("search", "w4a4"), ("faithful", STATIC)],
)  # fmt: skip
def test_nothing_is_said_where_a_method_works(method: str, scheme: str) -> None:
    assert told(method, scheme) == []


def test_the_method_is_in_the_recipe_and_the_text() -> None:
    compiled = fpcompiler.compile(tiny(Mlp), "w4a16", calibration=DATA, method="gptq")
    recipe = compiled.artifact.recipe
    assert (recipe["method"], recipe["attention"]) == ("gptq", None)
    assert repr(compiled) == f"CompiledModel({compiled.scheme!r}, method='gptq', 3 layers)"
    passes = fpcompiler.compile(
        tiny(Mlp), example_inputs=DATA[0], pipeline=compiled.artifact.pipeline.replace("gptq,", "")
    )
    assert "method" not in passes.artifact.recipe
    assert repr(passes) == f"CompiledModel({passes.scheme!r}, 3 layers)"
