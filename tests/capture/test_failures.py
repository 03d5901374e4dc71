"""What a user reads when a model cannot be captured: the place, the reason, the way out."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fpcompiler.capture import capture
from fpcompiler.errors import CaptureError
from tests.hf_models import hf_model
from tests.models import normal, token_ids

HERE = "# <-"
"""Marks the line that an error must name."""


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # <-
            return x
        return -x


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max().item())):  # <-
            x = x + 1
        return x


class Number(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * math.sqrt(x.sum())  # <-


class NumPy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)  # <-


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 2  # <-
        return self.last


class Collects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x * 2)  # <-
        return x


class WrongShape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(7, 7)  # <-


@torch.library.custom_op("fpctest::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """An operator that says nothing about its result."""
    return x * 2


@torch.library.custom_op("fpctest::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An operator that can be traced but is not PyTorch's."""
    return x * 2


twice.register_fake(torch.empty_like)


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.fpctest.opaque(x)  # <-


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.fpctest.twice(x)  # <-


class Conditional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))  # <-


class Wrapped(nn.Module):
    """Holds the failing module somewhere inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), inner])

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


def message_for(model: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(model, args, **options)
    return str(caught.value)


def marked_place(kind: type[nn.Module]) -> str:
    """Return the place of the marked line of a class as errors print it."""
    lines, start = inspect.getsourcelines(kind)
    number = next(i for i, line in enumerate(lines) if HERE in line)
    return f"{__file__}:{start + number} in forward: `{lines[number].strip()}`"


@pytest.mark.parametrize(
    ("kind", "problem", "fix"),
    [
        (Branch, "control flow in Python depends on the contents", "torch.where(condition, a, b)"),
        (Loop, "a number in Python comes from the contents", "masks instead of slices and loops"),
        (Number, "a number in Python comes from the contents", "instead of those of math"),
        (NumPy, "leaves PyTorch for NumPy", "use the torch function"),
        (Remembers, "keeps a tensor in self.last of layer 'blocks.1'", "register_buffer('last'"),
        (Collects, "keeps a tensor in self.seen of layer 'blocks.1'", "register_buffer('seen'"),
        (WrongShape, "the model itself fails on the example inputs", "call the model with these"),
        (Opaque, "says nothing about the shape of its result", "torch.library.register_fake"),
        (Foreign, "fpctest.twice.default, which is not part of PyTorch", "run_decompositions"),
        (Conditional, "the model uses cond, an operator that holds a graph", "torch.where"),
    ],
)
def test_the_message_names_place_problem_and_fix(
    kind: type[nn.Module], problem: str, fix: str
) -> None:
    message = message_for(Wrapped(kind()), normal(2, 4))
    text, _, advice = message.partition("\nFix: ")
    assert problem.lower() in text.lower()
    assert f"at {marked_place(kind)}" in text
    assert fix in advice
    assert "site-packages/torch" not in message


@pytest.mark.parametrize("kind", [Branch, Loop, NumPy, WrongShape, Opaque])
def test_the_message_names_the_layer(kind: type[nn.Module]) -> None:
    assert "in layer 'blocks.1'" in message_for(Wrapped(kind()), normal(2, 4))
    assert "in the model" in message_for(kind(), normal(2, 4))


def test_the_message_names_the_operator_and_what_torch_said() -> None:
    message = message_for(Opaque(), normal(2, 4))
    assert "operator: fpctest.opaque.default" in message
    assert "torch says: RuntimeError: There was no fake impl registered" in message


def test_the_original_error_is_chained() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(NumPy(), (normal(2, 4),))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_changed_parameter() -> None:
    class Trains(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.mul_(0.5)
            return super().forward(x)

    model = Trains(4, 4)
    before = model.weight.detach().clone()
    message = message_for(model, normal(2, 4))
    assert "changes its parameter 'weight'" in message
    assert "register_buffer" in message
    assert torch.equal(model.weight, before)


def test_a_cache_in_the_result() -> None:
    message = message_for(hf_model("hf-opt"), token_ids(2, 5), kwargs={"use_cache": True})
    assert "returns a cache of past keys and values" in message
    assert "pass use_cache=False" in message
    assert "fpcompiler.huggingface.CachedDecoder" in message


def test_a_result_of_another_type() -> None:
    class Result:
        pass

    class Returns(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {1: x} if self.training else Result()

    message = message_for(Returns(), normal(2, 4))
    assert "Returns cannot be captured: the model returns a " in message
    assert "Result" in message
    assert "Fix: return tensors, or tuples, lists and dicts" in message


def test_a_result_with_keys_that_are_no_texts() -> None:
    class Keys(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {1: x}

    message = message_for(Keys(), normal(2, 4))
    assert "the result has the key 1" in message
    assert "Fix: return tensors" in message


def test_missing_and_superfluous_example_inputs() -> None:
    message = message_for(nn.Bilinear(2, 2, 2), normal(2, 2))
    assert "do not fit Bilinear.forward: missing a required argument: 'input2'" in message
    assert "Fix: give the arguments without a default: input1, input2." in message
    assert "too many positional arguments" in message_for(nn.ReLU(), normal(2), normal(2))
    assert "unexpected keyword argument 'z'" in message_for(nn.ReLU(), normal(2), kwargs={"z": 1})


def test_example_inputs_of_other_types() -> None:
    with pytest.raises(CaptureError, match=r"a tensor of shape \[2\]; expected a tuple"):
        capture(nn.ReLU(), normal(2))  # type: ignore[arg-type]
    assert "argument 'input' is a object" in message_for(nn.ReLU(), object())
    assert "has the key 1; keys must be texts" in message_for(nn.ReLU(), {1: normal(2)})


def test_things_that_are_no_module() -> None:
    assert "expected a torch.nn.Module" in message_for(torch.relu, normal(2))
    compiled = torch.compile(nn.ReLU())
    assert "model._orig_mod" in message_for(compiled, normal(2))
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(nn.ReLU())
    assert "is a TorchScript module" in message_for(scripted, normal(2))


def test_own_dynamic_shapes_that_the_model_refuses() -> None:
    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([row * 2 for row in x])

    message = message_for(Rows(), normal(3, 4), dynamic=({0: Dim("rows")},))
    assert "does not allow the sizes that `dynamic` lets vary" in message
    assert "rows = 3" in message
    assert "leave those dimensions out of dynamic" in message


def test_own_dynamic_shapes_that_do_not_fit_the_inputs() -> None:
    message = message_for(nn.ReLU(), normal(3, 4), dynamic=({0: "rows"},))
    assert "`dynamic` does not fit the example inputs" in message
