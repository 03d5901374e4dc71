"""What a program keeps of the model: weights once, names, places, and a text that is its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from fpcompiler import ir
from fpcompiler.capture import capture
from fpcompiler.errors import CaptureError, IRError
from fpcompiler.ir.evaluate import ConstantEvaluator
from fpcompiler.ir.locations import place_of, short_path
from tests.models import LlamaBlock, TiedLanguageModel, ViTBlock, cases, normal
from tests.programs import Function, count, import_named, program_of

ROOT = Path(__file__).parents[2]


def test_tied_weights_are_one_tensor(captured) -> None:
    program = import_named(captured("tied"))
    (name,) = {"embed.weight", "lm_head.weight"} & set(program.weights)
    table = program.weights[name]
    assert sum(t.data_ptr() == table.data_ptr() for t in program.weights.values()) == 1
    assert ir.print_program(program).count(f"global private @{name}(") == 1


def test_weights_are_shared_with_the_model_not_copied() -> None:
    model = nn.Linear(8, 4)
    program = program_of(model, normal(2, 8))
    assert program.weights["weight"].data_ptr() == model.weight.data_ptr()
    assert not program.weights["weight"].requires_grad


def test_a_shared_module_has_one_set_of_globals(captured) -> None:
    program = import_named(captured("shared"))
    text = ir.print_program(program)
    for name in ("block.qkv.weight", "block.fc1.bias", "between.weight"):
        assert text.count(f"global private @{name}(") == 1
    layers = [str(op.attributes["fpq.layer"]) for op in program.operations("torch.aten.linear")]
    assert layers.count('"block.qkv"') == 2
    assert layers.count('"between"') == 1


def test_a_cache_is_a_mutable_global(captured) -> None:
    program = import_named(captured("cached"))
    text = ir.print_program(program)
    assert re.findall(r"global private mutable @(\w+)\(", text) == ["k_cache", "v_cache"]
    assert count(program, "ml_program.global_store") == 2


def test_operations_know_module_and_line() -> None:
    source = (ROOT / "tests/models.py").read_text().splitlines()
    program = program_of(LlamaBlock(), normal(1, 4, 64))
    places = {}
    for op in program.operations("torch.aten.linear"):
        place = place_of(op)
        file, line = place.source.rsplit(":", 1)
        places[place.layer] = (file, int(line))
    assert list(places) == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    # The innermost line outside torch: where the block calls the layer.
    for layer, (file, line) in places.items():
        assert file == "tests/models.py"
        assert f"self.{layer}(" in source[line - 1]


class Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


def test_the_model_itself_has_no_path_and_says_its_line() -> None:
    program = program_of(Plain(), normal(2, 8))
    (tanh,) = program.operations("torch.aten.tanh")
    place = place_of(tanh)
    assert (place.name, place.layer) == ("tanh", "")
    assert re.fullmatch(r"tests/ir/test_importer\.py:\d+", place.source)
    assert str(place) == f"tanh ({place.source})"


def test_paths_are_relative_to_where_they_are_imported_from(tmp_path: Path) -> None:
    assert short_path(str(ROOT / "tests/models.py")) == "tests/models.py"
    assert short_path(torch.nn.functional.__file__) == "torch/nn/functional.py"
    assert short_path("/nowhere/at/all/net.py") == "net.py"


@pytest.mark.parametrize("name", ["llama", "vit", "dit", "cached", "hf-gpt2", "decoder-llama"])
def test_the_text_has_no_absolute_paths_and_no_addresses(name: str, captured) -> None:
    text = ir.print_program(import_named(captured(name)))
    assert not re.search(r'"/|0x[0-9a-f]{6}', text)
    assert str(ROOT) not in text


def test_two_captures_give_the_same_text() -> None:
    def text() -> str:
        model, args, kwargs = cases()["vit"].make()
        return ir.print_program(ir.import_program(capture(model, args, kwargs).exported))

    assert text() == text()


def test_values_are_named_as_in_the_exported_graph() -> None:
    text = ir.print_program(program_of(ViTBlock(), normal(1, 4, 64)), locations=False)
    assert "func.func @main(%x: !torch.vtensor<[?,?,64],f32>)" in text
    for name in ("%layer_norm = ", "%linear_1 = ", "%int2 = torch.constant.int 2", "%none = "):
        assert name in text
    assert "loc(" not in text


def test_a_clone_shares_tensors_and_nothing_else() -> None:
    program = program_of(nn.Linear(8, 4), normal(2, 8))
    copy = program.clone()
    assert ir.print_program(copy) == ir.print_program(program)
    copy.stage = ir.Stage.NORMALIZED
    del copy.weights["bias"]
    assert program.stage is ir.Stage.CAPTURED
    assert "bias" in program.weights
    assert copy.weights["weight"] is program.weights["weight"]


def test_weights_that_are_not_loaded_are_an_error_that_says_what_to_do() -> None:
    weights = ir.Weights({"a": torch.zeros(1)})
    with pytest.raises(IRError) as caught:
        _ = weights["layers.0.weight"]
    assert str(caught.value) == (
        "The value of @layers.0.weight is not loaded. A pass that reads weights needs them: give "
        "the file that holds them (fpcompiler opt --weights FILE)."
    )
    assert weights.unused_name("a") == "a.2"
    assert weights.unused_name("b") == "b"
    weights.keep(set())
    assert len(weights) == 0


def scaled(self, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, (self.w * self.g).t().contiguous()) + torch.rand(1) * 0


def test_constants_are_found_and_evaluated() -> None:
    model = Function(scaled, w=normal(8, 4), g=normal(1, 4, seed=1))
    program = program_of(model, normal(2, 8))
    evaluator = ConstantEvaluator(program)
    with program.context():
        known = {op.name: evaluator.is_constant(op) for op in program.operations()}
        assert known["torch.aten.mul.Tensor"]
        assert known["torch.aten.t"]
        assert not known["torch.aten.linear"]
        assert not known["torch.aten.rand"]
        (transposed,) = program.operations("torch.aten.t")
        assert torch.equal(evaluator.evaluate(transposed.results[0]), (model.w * model.g).t())
        assert evaluator.source_values(transposed) == 36


def test_a_mutable_global_is_no_constant(captured) -> None:
    program = import_named(captured("cached"))
    evaluator = ConstantEvaluator(program)
    loads = {
        str(op.attributes["global"]): op for op in program.operations("ml_program.global_load")
    }
    assert evaluator.is_constant(loads["@qkv.weight"])
    assert not evaluator.is_constant(loads["@k_cache"])


CHAIN = """
func.func @main(%x: !torch.vtensor<[2],f32>) -> !torch.vtensor<[2],f32> {{
  %y0 = torch.aten.tanh %x : !torch.vtensor<[2],f32> -> !torch.vtensor<[2],f32>
{}
  return %y{} : !torch.vtensor<[2],f32>
}}"""


def test_a_program_may_be_deeper_than_the_stack_of_python() -> None:
    kind = "!torch.vtensor<[2],f32>"
    lines = [f"  %y{i + 1} = torch.aten.tanh %y{i} : {kind} -> {kind}" for i in range(3000)]
    program = ir.parse_program(CHAIN.format("\n".join(lines), 3000))
    assert not ConstantEvaluator(program).is_constant(program.operations()[-2])


def test_what_mlir_cannot_express_is_an_error_without_addresses() -> None:
    model = Function(lambda self, x: x.sum() + max(x.shape[0], 2 * x.shape[1]))
    program = capture(model, (normal(3, 4),))
    with pytest.raises(CaptureError) as caught:
        ir.import_program(program.exported)
    first, fix = str(caught.value).splitlines()
    assert first == (
        "The exported graph could not be brought into MLIR: Unimplemented call_function: "
        "target=<function sym_max>."
    )
    assert fix.startswith("Fix: look for the operation it names in the model;")
    fixed = capture(model, (normal(3, 4),), dynamic=None)
    ir.import_program(fixed.exported)


def test_tied_and_untied_heads_have_the_names_of_their_modules() -> None:
    program = program_of(TiedLanguageModel(), torch.zeros(1, 4, dtype=torch.int64))
    names = [str(op.attributes["fpq.layer"]) for op in program.operations("torch.aten.embedding")]
    assert names == ['"embed"']
    assert str(program.operations("torch.aten.linear")[-1].attributes["fpq.layer"]) == '"lm_head"'
