"""ONNX files of compiled models: what they hold, and that they compute the same."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import fpcompiler
from fpcompiler.errors import ArtifactError, DependencyError, ExportError, OptionError
from fpcompiler.interop.onnx import write
from fpcompiler.interop.onnx.read import read_weights
from fpcompiler.numerics import dequantize_packed
from fpcompiler.operand import Operand
from fpcompiler.runtime.model import CompiledModel
from tests.interop.conftest import example


def stored(compiled: CompiledModel) -> dict[str, np.ndarray]:
    """Return the weights of an artifact, dequantized, by layer."""
    plan, tensors, found = compiled.artifact.plan, compiled.artifact.tensors, {}
    for step in plan.steps:
        if step.op == "fpc.linear":
            packed, *scales = (tensors[plan.constants[arg["v"]]] for arg in step.args[1])
            operand = Operand.parse(step.args[4])
            values = dequantize_packed(packed, tuple(scales), operand, step.args[5])
            found[step.args[7]] = values.numpy()
    return found


def evaluated(file: Path, *inputs: torch.Tensor) -> list[np.ndarray]:
    """Run a file on onnx's own evaluator."""
    model = onnx.load(file)
    names = [value.name for value in model.graph.input]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return ReferenceEvaluator(model).run(None, feeds)


def test_a_portable_file_gives_the_bits_of_the_reference(compiled, portable) -> None:
    model = fpcompiler.load(portable, backend="onnxruntime")
    for rows in (1, 3, 8):
        x, extra = example(rows)
        expected, found = compiled(x, extra), model(x, extra=extra)
        # The norm's last bits are onnxruntime's own; no code turns over here.
        torch.testing.assert_close(found["y"], expected["y"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["h"][0], expected["h"][0], rtol=1e-5, atol=1e-5)


def test_a_standard_file_gives_the_same_on_the_evaluator_of_onnx(compiled, standard) -> None:
    x, extra = example(5)
    expected = compiled(x, extra)
    y, h = evaluated(standard, x, extra["bias"])
    np.testing.assert_allclose(y, expected["y"].numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(h, expected["h"][0].numpy(), rtol=1e-5, atol=1e-5)


def test_a_residual_is_part_of_the_graph(adding, tmp_path) -> None:
    adding.export(tmp_path / "model.onnx", "onnx-standard")
    x = example(5)[0][:, :64].contiguous()
    (y,) = evaluated(tmp_path / "model.onnx", x)
    np.testing.assert_allclose(y, adding(x).numpy(), rtol=1e-5, atol=1e-5)


def test_weights_are_read_back_bit_for_bit(compiled, portable, standard) -> None:
    expected = stored(compiled)
    for file in (portable, standard):
        weights = read_weights(file)
        assert list(weights) == list(expected) == ["first", "second", "last"]
        for layer, values in expected.items():
            np.testing.assert_array_equal(weights[layer].values, values)
            assert str(weights[layer].operand) == "f4E2M1FN@row:f32/block32:f8E8M0FNU"


def test_the_graph_itself_computes_these_weights(compiled, standard) -> None:
    model = onnx.load(standard)
    names = {
        node.name.removesuffix(f"/weight/{node.name.rsplit('/')[-1]}"): node.output[0]
        for node in model.graph.node
        if "/weight/" in node.name
    }
    for name in names.values():
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    x, extra = example(2)
    feeds = {"x": x.numpy(), "extra.bias": extra["bias"].numpy()}
    found = ReferenceEvaluator(model).run(list(names.values()), feeds)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for layer, values in zip(names, found, strict=True):
        whole = values * constants[f"{layer}.weight.outer_scale"][:, None]
        np.testing.assert_array_equal(whole, stored(compiled)[layer])


def test_a_standard_file_has_the_types_of_onnx(standard) -> None:
    model = onnx.load(standard)
    kinds = collections.Counter(
        onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer
    )
    assert (kinds["FLOAT4E2M1"], kinds["FLOAT8E8M0"]) == (3, 3)
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    assert shapes["second.weight.codes"] == [33, 64]
    assert shapes["second.weight.block_scale"] == [33, 2]
    operations = collections.Counter(node.op_type for node in model.graph.node)
    assert (operations["QuantizeLinear"], operations["DequantizeLinear"]) == (3, 6)
    # The activations are FLOAT6E2M3, which came with opset 28.
    assert (model.opset_import[0].version, model.ir_version) == (28, 14)


def test_a_portable_file_needs_opset_18_and_no_narrow_type(portable) -> None:
    model = onnx.load(portable)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert model.ir_version == 8
    kinds = {onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}
    assert kinds <= {"FLOAT", "DOUBLE", "INT64", "INT32", "UINT8", "BOOL"}
    packed = {t.name: list(t.dims) for t in model.graph.initializer}["second.weight.codes"]
    assert packed == [33, 32]


def test_sizes_that_vary_have_the_names_of_the_plan(compiled, portable) -> None:
    assert [*compiled.artifact.plan.symbols] == ["batch"]
    graph = onnx.load(portable).graph
    shapes = [value.type.tensor_type.shape for value in [*graph.input, *graph.value_info]]
    names = {dim.dim_param for shape in shapes for dim in shape.dim} - {""}
    assert {name for name in names if not name.startswith("unk__")} == {"batch"}
    assert [value.name for value in graph.input] == ["x", "extra.bias"]
    assert [value.name for value in graph.output] == ["y", "h[0]"]


def test_a_file_says_nothing_of_the_machine(portable, standard) -> None:
    for file in (portable, standard):
        text = file.read_bytes()
        assert str(Path(__file__).parents[2]).encode() not in text
        assert b"stack_trace" not in text
        assert b"site-packages" not in text


def test_the_highest_opset_can_be_given(tiny, tmp_path) -> None:
    file, x = tmp_path / "model.onnx", torch.randn(2, 64)
    facts = tiny.export(file, "onnx-standard", opset=24).facts
    assert (facts["opset"], facts["quantized_weights"]) == (24, {"FLOAT4E2M1": 1})
    np.testing.assert_array_equal(evaluated(file, x)[0], tiny(x).numpy())
    with pytest.raises(OptionError, match="opset must be a number, such as 24, not str"):
        tiny.export(file, "onnx-standard", opset="24")
    with pytest.raises(OptionError, match="opset=29: it is one from 18 to 28"):
        tiny.export(file, "onnx-standard", opset=29)


def test_constants_can_go_into_a_file_of_their_own(tiny, tmp_path) -> None:
    file, x = tmp_path / "model.onnx", torch.randn(2, 64)
    written = tiny.export(file, "onnx-portable", external_data=True)
    names = ["model.onnx", "model.onnx.data", "model.onnx.golden.safetensors"]
    assert [f.name for f in written.files] == names == sorted(p.name for p in tmp_path.iterdir())
    codes = tiny.artifact.tensors["0.weight.codes"].numpy().tobytes()
    assert codes in file.with_name("model.onnx.data").read_bytes()
    assert codes not in file.read_bytes()
    model = fpcompiler.load(file, backend="onnxruntime")
    torch.testing.assert_close(model(x), tiny(x), rtol=0, atol=0)
    np.testing.assert_array_equal(read_weights(file)["0"].values, stored(tiny)["0"])


def test_above_two_gigabytes_constants_always_do(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(write, "_INLINE_LIMIT", 1000)
    written = tiny.export(tmp_path / "model.onnx", "onnx-portable")
    assert "model.onnx.data" in [f.name for f in written.files]


def test_recorded_calls_of_a_file_that_was_here_before_go(tiny, tmp_path) -> None:
    file = tmp_path / "model.onnx"
    tiny.export(file, "onnx-portable")
    silent = CompiledModel(dataclasses.replace(tiny.artifact, golden=()))
    assert silent.export(file, "onnx-portable").files == (file,)
    assert [*tmp_path.iterdir()] == [file]


def test_constants_of_a_file_that_was_here_before_go(tiny, tmp_path) -> None:
    file = tmp_path / "model.onnx"
    tiny.export(file, "onnx-portable", external_data=True)
    data = tmp_path / "model.onnx.data"
    assert data.is_file()
    tiny.export(file, "onnx-portable")
    assert not data.exists()
    assert fpcompiler.load(file, backend="onnxruntime").verify().ok


def test_static_scales_of_inputs_are_constants(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(64, 48).eval(), torch.randn(3, 64)
    compiled = fpcompiler.compile(
        model, "nvfp4", example_inputs=(x,), static_inputs=True, calibration=[x],
        target="reference",
    )  # fmt: skip
    assert "fpc.quantize_within" in [step.op for step in compiled.artifact.plan.steps]
    for style in ("portable", "standard"):
        file = tmp_path / f"{style}.onnx"
        compiled.export(file, f"onnx-{style}")
        # A call beyond the calibration data saturates, so that a scale of its own would show.
        for scale in (0.1, 1.0, 50.0):
            found = evaluated(file, x * scale)[0]
            np.testing.assert_allclose(found, compiled(x * scale).numpy(), rtol=1e-5, atol=1e-6)


def test_an_operator_without_a_form_is_refused_by_layer(tmp_path) -> None:
    class Strange(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(64, 64)

        def forward(self, x):
            h = self.inner(x).abs()
            return torch.igamma(h, h)

    compiled = fpcompiler.compile(Strange().eval(), example_inputs=(torch.ones(2, 64),))
    with pytest.raises(ExportError) as caught:
        compiled.export(tmp_path / "model.onnx", "onnx-portable")
    assert str(caught.value) == (
        "behind layer 'inner': the operator aten.igamma has no form in ONNX that torch knows. "
        "Replace it in the model by other operations, do it outside of the compiled part, or "
        "export to pt2."
    )
    assert not [*tmp_path.iterdir()]


def test_a_missing_package_is_named_with_the_extra(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(write, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(DependencyError) as caught:
        tiny.export(tmp_path / "model.onnx", "onnx-portable")
    assert str(caught.value) == ("ONNX files need no_such_package: pip install 'fpcompiler[onnx]'.")


def test_a_package_that_cannot_be_imported_is_named(tiny, tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise ImportError('libprotobuf.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(write, "PACKAGES", ("onnx", "broken_package"))
    with pytest.raises(DependencyError, match=r"broken_package, which .* fails: libprotobuf"):
        tiny.export(tmp_path / "model.onnx", "onnx-portable")


@pytest.mark.parametrize(("format", "suffix"), [("onnx-portable", "onnx"), ("pt2", "pt2")])
def test_where_no_file_can_be_written_nothing_is(tiny, tmp_path, format, suffix) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="could not be written: No such file or directory"):
        tiny.export(tmp_path / "none" / f"model.{suffix}", format)
    with pytest.raises(ExportError, match="folder is a folder; give the name of a file"):
        tiny.export(tmp_path / "folder", format)
    with pytest.raises(ExportError, match="could not be written: Not a directory"):
        tiny.export(tmp_path / "file" / f"model.{suffix}", format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert not [*(tmp_path / "folder").iterdir()]


def test_a_file_of_another_program_has_no_weights_of_ours(tmp_path) -> None:
    file = tmp_path / "other.onnx"
    graph = onnx.helper.make_graph([], "other", [], [])
    onnx.save(onnx.helper.make_model(graph), file)
    with pytest.raises(ArtifactError, match="it has no property 'fpcompiler' of version 1"):
        read_weights(file)


def test_the_property_holds_the_call_and_no_program(portable) -> None:
    (entry,) = onnx.load(portable).metadata_props
    plan = json.loads(entry.value)["plan"]
    assert entry.key == "fpcompiler"
    assert [step["op"] for step in plan["steps"]] == ["py.onnx"]
    assert [row["name"] for row in plan["layers"]] == ["first", "second", "last"]
