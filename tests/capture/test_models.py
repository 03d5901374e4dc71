"""Every shared test model: the captured graph gives the same bits as the model, at every shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from fpcompiler import tree
from fpcompiler.capture import CapturedProgram, capture
from tests.models import Case, cases, normal, own_cases

Captured = Callable[[str], CapturedProgram]

CASES = cases()


def as_captured(program: CapturedProgram, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments for the model itself: without cache if it was captured so."""
    constants = {p.name: p.spec["v"] for p in program.signature.parameters if is_constant(p.spec)}
    cache = {name: value for name, value in constants.items() if name == "use_cache"}
    return cache | kwargs


def is_constant(spec: tree.Spec | None) -> bool:
    return spec is not None and spec["t"] == "const"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_graph_equals_the_model_bit_for_bit(case: Case, captured: Captured) -> None:
    program = captured(case.name)
    model, args, kwargs = case.make()
    run = program.exported.module()
    with torch.no_grad():
        for call_args, call_kwargs in [(args, kwargs), *case.other_inputs()]:
            expected = model(*call_args, **as_captured(program, call_kwargs))
            leaves = pytree.tree_leaves(run(*call_args, **call_kwargs))
            assert tree.spec_of(expected) == program.signature.outputs
            wanted = tree.flatten(program.signature.outputs, expected, "result")
            assert len(leaves) == len(wanted)
            assert all(map(torch.equal, leaves, wanted))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_batch_and_length_vary_from_one_upwards(case: Case, captured: Captured) -> None:
    program = captured(case.name)
    assert program.symbols
    assert all(symbol.min == 1 for symbol in program.symbols.values())
    sizes = {size for p in program.placeholders for size in p.shape if isinstance(size, str)}
    assert sizes == set(program.symbols)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_graph_is_functional_and_only_aten(case: Case, captured: Captured) -> None:
    program = captured(case.name)
    targets = [n.target for n in program.exported.graph.nodes if n.op == "call_function"]
    operators = [t for t in targets if isinstance(t, torch._ops.OpOverload)]
    assert {t.namespace for t in operators} == {"aten"}
    assert not any(t._schema.is_mutable for t in operators)
    assert bool(program.state) == case.state


@pytest.mark.parametrize("name", ["llama", "vit", "dit", "hf-llama", "hf-gpt2", "decoder-llama"])
def test_linear_layers_and_attention_stay_recognisable(name: str, captured: Captured) -> None:
    targets = {str(n.target) for n in captured(name).exported.graph.nodes}
    linear = {"aten.linear.default", "aten.addmm.default"}
    attention = {"aten.scaled_dot_product_attention.default", "aten.softmax.int"}
    assert targets & linear
    assert targets & attention


def test_the_placeholders_follow_the_parameters_of_forward(captured: Captured) -> None:
    program = captured("dit")
    assert [p.name for p in program.signature.parameters] == ["latent", "timestep", "context"]
    latent, timestep, context = program.placeholders
    (batch,) = timestep.shape
    assert latent.shape == (batch, 4, 8, 8)
    assert (context.shape[0], context.shape[2]) == (batch, 48)
    assert [p.dtype for p in program.placeholders] == ["float32", "int64", "float32"]


def test_the_state_names_the_buffers(captured: Captured) -> None:
    assert captured("cached").state == ("k_cache", "v_cache")
    assert captured("decoder-gpt2").state == (
        "key_cache_0", "value_cache_0", "key_cache_1", "value_cache_1",
    )  # fmt: skip


def test_tied_weights_stay_one_tensor(captured: Captured) -> None:
    state = captured("tied").exported.state_dict
    weights = {state[name].data_ptr() for name in ("embed.weight", "lm_head.weight")}
    assert len(weights) == 1


def test_notes_say_which_sizes_are_fixed_and_why(captured: Captured) -> None:
    (batch,) = captured("cached").notes
    assert batch.startswith("dimension 0 of x is fixed at 1: with another size the export fails")
    assert "index_copy_" in batch
    (mel,) = captured("hf-whisper").notes
    assert mel == (
        "dimension 1 of input_features is fixed at 16: the model's code works for this size only"
    )
    (positions,) = captured("hf-bert").notes
    assert positions == "dimension 1 of input_ids is at most 128: so says the model"


def test_every_own_case_has_a_call_with_batch_one() -> None:
    for case in own_cases().values():
        batches = [pytree.tree_leaves(call)[0].shape[0] for call in case.other_inputs()]
        assert 1 in batches, case.name


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


LAYERS = {
    "convolution": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten()),
        normal(2, 3, 6, 6),
        "aten.conv2d.default",
    ),
    "attention": (
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        normal(2, 5, 16),
        "aten.linear.default",
    ),
    "recurrent": (Recurrent(), normal(2, 5, 8), "aten.lstm.input"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_common_layers_of_torch(name: str) -> None:
    model, x, operator = LAYERS[name]
    program = capture(model.eval(), (x,))
    assert operator in {str(node.target) for node in program.exported.graph.nodes}
    with torch.no_grad():
        # Close, not equal: eager mode runs the attention layer in one fused kernel.
        torch.testing.assert_close(program.exported.module()(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, args, _ = CASES["tied"].make()
    program = capture(model.to(dtype), args)
    assert torch.equal(program.exported.module()(*args), model(*args))
