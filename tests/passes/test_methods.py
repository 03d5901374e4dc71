"""Methods as a whole: what fits together, what is refused, and when."""

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.errors import OptionError, PassError, RunError
from fpcompiler.passes import METHODS, default_pipeline, pipeline_text
from tests.passes.tiny import Mlp, tiny

X = torch.randn(48, 32, generator=torch.Generator().manual_seed(2))
FP8 = "f8E4M3FN@token:f32"
DATA = [X[:24], X[24:]]
BEFORE = "cse,normalize,fold-constants,insert-quantize{scheme=w4a4},cse"
AFTER = "quantize-weights,lower-gemm"


class Twice(nn.Module):
    """A layer that two different inputs go through, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(self.norm(x))))


def distance(method: str, scheme: str) -> float:
    torch.manual_seed(0)
    model = Twice().eval()
    x = torch.randn(256, 64)
    x[:, 3] *= 20
    compiled = fpcompiler.compile(model, scheme, calibration=[x[:128], x[128:]], method=method)
    with torch.no_grad():
        return float((compiled(x) - model(x)).norm() / model(x).norm())


@pytest.mark.filterwarnings("ignore:The method")  # most leave such a weight as it is
@pytest.mark.parametrize("method", [name for name in METHODS if name != "rtn"])
@pytest.mark.parametrize("scheme", ["w4a6", "w4a16"])
def test_a_weight_with_two_inputs_gets_no_worse(method: str, scheme: str) -> None:
    assert distance(method, scheme) <= 1.1 * distance("rtn", scheme)


@pytest.mark.parametrize("item", ["smooth", "rotate"])
def test_what_changes_weights_comes_before_what_scales_or_rounds_them(item: str) -> None:
    for first, reason in (
        ("search-formats", f"put {item} before search-formats"),
        ("gptq", f"{item}: all weights are rounded already"),
    ):
        with pytest.raises(PassError, match=reason):
            fpcompiler.compile(
                tiny(Mlp), calibration=DATA, pipeline=f"{BEFORE},{first},{item},{AFTER}"
            )


@pytest.mark.filterwarnings("ignore:The method")
@pytest.mark.parametrize(("name", "method"), METHODS.items())
def test_every_method_runs_or_says_at_once_what_it_needs(name: str, method) -> None:
    model = tiny(Mlp)
    if method.needs_data:
        with pytest.raises(OptionError, match=f"the method {name} learns from data"):
            fpcompiler.compile(model, method=name)
    compiled = fpcompiler.compile(model, "w4a4", calibration=DATA, method=name)
    assert (compiled(X) - model(X)).norm() < 0.5 * model(X).norm()


REFUSED = {
    "one tensor": ({"calibration": X}, "not one Tensor"),
    "one dict": ({"calibration": {"x": X}}, "not one dict"),
    "a number": ({"calibration": 5}, "not one int"),
    "a seed": ({"calibration": DATA, "seed": 1.5}, "seed must be a whole number"),
    "a folder": ({"calibration": DATA, "work_dir": __file__}, "work_dir: .* cannot be made"),
    "two of one": ({"calibration": DATA, "method": "gptq", "pipeline": "cse"}, "leave out method="),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_arguments_that_cannot_be_meant_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fpcompiler.compile(tiny(Mlp), **arguments)


WRONG = {
    "example_inputs": (3, "a tensor, or a tuple of positional arguments such as (x,)"),
    "example_kwargs": ([X], "a dict of keyword arguments, such as {'x': x}"),
    "target": (None, "the name of a target, such as 'cpu'"),
    "method": (3, "the name of a method, such as 'gptq'"),
    "attention": (True, "an operand such as 'f8E4M3FN@token:f32'"),
    "pipeline": (3, "a text or a tuple of passes"),
    "dump_dir": (3, "a folder, such as 'dumps'"),
    "work_dir": (3, "a folder, such as 'work'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_of_another_type_is_refused_with_what_to_write(name: str) -> None:
    value, wanted = WRONG[name]
    arguments = {"calibration": DATA, name: value}
    with pytest.raises(OptionError) as caught:
        fpcompiler.compile(tiny(Mlp), **arguments)
    assert str(caught.value) == f"{name} must be {wanted}, not {type(value).__name__}."


def test_a_path_of_another_type_is_refused() -> None:
    compiled = fpcompiler.compile(tiny(Mlp), example_inputs=X)
    with pytest.raises(OptionError, match=r"the path must be .*save\('model.fpc'\), not int"):
        compiled.save(3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"the path must be .*load\('model.fpc'\), not int"):
        fpcompiler.load(3)  # type: ignore[arg-type]


def test_a_batch_that_the_model_cannot_run_is_named() -> None:
    data = [X.bfloat16(), X.bfloat16()]
    with pytest.raises(RunError, match="the model cannot run on the calibration") as caught:
        fpcompiler.compile(tiny(Mlp), "w4a4", calibration=data, method="gptq")
    assert "in calibration batch 1" in caught.value.__notes__


def test_a_budget_is_for_methods_that_learn_roundings() -> None:
    with pytest.raises(PassError, match="not for gptq: adaround"):
        fpcompiler.compile(tiny(Mlp), calibration=DATA, method="gptq", round_budget="5min")
    with pytest.raises(PassError, match="write for instance 90s"):
        fpcompiler.compile(tiny(Mlp), calibration=DATA, method="adaround", round_budget="soon")
    budget = default_pipeline("w4a6", method="adaround", round_budget="1s")
    assert "round-weights{budget=1s}" in pipeline_text(budget)


def test_roundings_are_learned_with_attention_quantized() -> None:
    items = [
        item.name for item in default_pipeline("w4a6", method="search-adaround", attention=FP8)
    ]
    assert items.index("search-formats") < items.index("quantize-attention")
    assert items.index("quantize-attention") < items.index("round-weights")
    items = [item.name for item in default_pipeline("w4a6", method="gptq", attention=FP8)]
    assert items.index("gptq") < items.index("quantize-attention")
