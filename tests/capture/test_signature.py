"""How a captured model is called: parameters, constants and the nesting of results."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fpcompiler.capture import capture, from_exported
from fpcompiler.errors import CaptureError
from fpcompiler.plan import Parameter, Signature, Symbol
from tests.hf_models import hf_model
from tests.models import CachedAttention, normal, token_ids

LEAF = {"t": "leaf"}
NONE = {"t": "none"}


class Nested(nn.Module):
    def forward(
        self,
        pair: tuple[Tensor, Tensor],
        scale: float = 2.0,
        *,
        extra: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        total = pair[0] * scale + pair[1]
        if extra is not None:
            total = total + extra["shift"]
        return {"total": total, "parts": [pair[0], None]}


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, pair: list[Tensor]) -> Tensor:
        return x * self.scale - pair[0] * 2 + pair[1]


def test_one_tensor_given_for_several_arguments_stays_several_inputs() -> None:
    model = Difference()
    for tensor in (normal(2, 3), model.scale):
        program = capture(model, (tensor, [tensor, tensor]), dynamic=None).exported.module()
        x, y, z = (normal(*tensor.shape, seed=seed) for seed in (1, 2, 3))
        assert torch.equal(program(x, [y, z]), model(x, [y, z]))


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1


def test_nested_arguments_and_results() -> None:
    pair = (normal(2, 3), normal(2, 3, seed=1))
    program = capture(Nested(), (pair,), {"extra": {"shift": normal(2, 3, seed=2)}})
    assert program.signature == Signature(
        parameters=(
            Parameter("pair", {"t": "tuple", "c": [LEAF, LEAF]}),
            Parameter("scale", {"t": "const", "v": 2.0}),
            Parameter("extra", {"t": "dict", "k": ["shift"], "c": [LEAF]}),
        ),
        outputs={
            "t": "dict",
            "k": ["total", "parts"],
            "c": [LEAF, {"t": "list", "c": [LEAF, NONE]}],
        },
    )
    assert len(program.placeholders) == 3


@pytest.mark.parametrize("given", [{"scale": 3.0}, {}])
def test_scalars_become_constants_by_keyword_or_position(given: dict[str, float]) -> None:
    pair = (normal(2, 3), normal(2, 3, seed=1))
    args = (pair,) if given else (pair, 3.0)
    program = capture(Nested(), args, given)
    scale = program.signature.parameters[1]
    assert scale == Parameter("scale", {"t": "const", "v": 3.0})
    leaves = program.exported.module()(*args)
    assert torch.equal(leaves["total"], pair[0] * 3.0 + pair[1])


def test_an_argument_left_out_counts_as_its_default() -> None:
    program = capture(Nested(), ((normal(2, 3), normal(2, 3)),))
    assert program.signature.parameters[2] == Parameter("extra", NONE)


@pytest.mark.parametrize("by_keyword", [True, False])
def test_hugging_face_models_are_called_without_a_cache(by_keyword: bool) -> None:
    model, ids, mask = hf_model("hf-gpt2"), token_ids(2, 5), torch.ones(2, 5, dtype=torch.int64)
    args: tuple[Any, ...] = () if by_keyword else (ids, None, mask)
    # In another order than that of forward.
    kwargs = {"attention_mask": mask, "input_ids": ids} if by_keyword else {}
    signature = capture(model, args, kwargs).signature
    specs = {p.name: p.spec for p in signature.parameters}
    assert list(specs)[:3] == ["input_ids", "past_key_values", "attention_mask"]
    assert specs["input_ids"] == specs["attention_mask"] == LEAF
    assert specs["use_cache"] == {"t": "const", "v": False}
    assert signature.outputs == {"t": "output", "k": ["logits"], "c": [LEAF]}


def test_scalars_in_keyword_arguments_without_a_name() -> None:
    model = hf_model("hf-llama")
    program = capture(model, (token_ids(2, 5),), {"output_hidden_states": True})
    assert program.signature.fixed == {"output_hidden_states": True}
    assert program.signature.outputs["k"] == ["logits", "hidden_states"]
    assert len(program.symbols) == 2


def test_a_bare_call_of_a_hugging_face_model() -> None:
    model, ids = hf_model("hf-opt"), token_ids(2, 5)
    program = capture(model, (ids,))
    result = program.exported.module()(ids)
    assert torch.equal(result.logits, model(ids, use_cache=False).logits)


def test_a_model_that_changes_its_input() -> None:
    x = normal(2, 3)
    before = x.clone()
    program = capture(InPlace(), (x,))
    assert torch.equal(x, before)
    assert program.notes == (
        "the model changes its argument x in place; the compiled model leaves it as it is",
    )
    assert torch.equal(program.exported.module()(x), before * 2 + 1)
    assert torch.equal(x, before)


def test_an_exported_program_is_taken_as_it_is() -> None:
    batch = torch.export.Dim("batch", min=2, max=7)
    with torch.no_grad():
        exported = torch.export.export(
            Nested(),
            ((normal(3, 4), normal(3, 4)),),
            {"scale": 3.0},
            dynamic_shapes={"pair": ({0: batch}, {0: batch}), "scale": None},
        )
    program = from_exported(exported)
    assert program.signature.parameters == (
        Parameter("pair", {"t": "tuple", "c": [LEAF, LEAF]}),
        Parameter("scale", {"t": "const", "v": 3.0}),
    )
    assert program.symbols == {"pair_0_dim0": Symbol(2, 7)}
    assert [p.shape for p in program.placeholders] == [("pair_0_dim0", 4)] * 2


def test_an_exported_program_with_state_is_made_functional_and_not_changed() -> None:
    inputs = (normal(1, 3, 64), torch.arange(3))
    with torch.no_grad():
        exported = torch.export.export(CachedAttention().eval(), inputs)
    before = exported.graph_module.code
    program = from_exported(exported)
    assert program.state == ("k_cache", "v_cache")
    assert exported.graph_module.code == before
    assert not exported.graph_signature.buffers_to_mutate


def test_an_exported_program_from_a_file() -> None:
    x = normal(2, 3)
    file = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(3, 4), (x,)), file)
    file.seek(0)
    program = from_exported(torch.export.load(file))
    assert [p.name for p in program.signature.parameters] == ["input"]
    assert program.exported.module()(x).shape == (2, 4)


def test_a_varying_number_as_input_is_refused() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return x * n

    shapes = {"x": None, "n": torch.export.Dim.DYNAMIC}
    exported = torch.export.export(Scaled(), (normal(2, 3), 5), dynamic_shapes=shapes)
    with pytest.raises(CaptureError, match=r"input 'n' is a number that may vary"):
        from_exported(exported)
