"""The backend onnxruntime: called like the model, with caches that live from call to call."""

from __future__ import annotations

import json

import onnx
import pytest
import torch

import fpcompiler
from fpcompiler.artifact import Artifact
from fpcompiler.errors import (
    ArtifactError,
    DependencyError,
    OptionError,
    RunError,
    TargetError,
)
from fpcompiler.numerics import pack, quantize
from fpcompiler.operand import Operand
from fpcompiler.plan import Parameter, Placeholder, Plan, Signature, Step, Symbol
from fpcompiler.runtime import onnx_model
from fpcompiler.runtime.model import CompiledModel
from fpcompiler.runtime.onnx_model import OnnxModel
from tests.interop.conftest import example
from tests.models import own_cases
from tests.plans import value

ATTENTION = (
    "qkv=f8E4M3FN@token:f32,weights=f4E2M1FN@block16:f8E8M0FNU,cache=f6E2M3FN@block16:f8E8M0FNU"
)


def test_it_is_called_like_the_model(portable) -> None:
    model = fpcompiler.load(portable, backend="onnxruntime")
    x, extra = example(2)
    assert isinstance(model, OnnxModel)
    assert torch.equal(model(x, extra)["y"], model(extra=extra, x=x)["y"])
    with pytest.raises(RunError, match="Argument 'extra' is missing"):
        model(x)
    with pytest.raises(RunError, match="Argument 'x': expected float32, got float64"):
        model(x.double(), extra)
    with pytest.raises(RunError, match="dimension 1 must be 72"):
        model(x[:, :71], extra)
    assert [row.name for row in model.plan().rows] == ["first", "second", "last"]
    assert model.scheme.startswith("w=f4E2M1FN@row:f32/block32:f8E8M0FNU,a=f6E2M3FN")
    assert repr(model).endswith("'model.onnx')")
    assert model.device == torch.device("cpu")


def test_it_replays_the_recorded_call(portable, tmp_path) -> None:
    report = fpcompiler.load(portable, backend="onnxruntime").verify()
    assert report.ok
    assert report.rows[0].detail.startswith("SQNR ")
    moved = tmp_path / "alone.onnx"
    moved.write_bytes(portable.read_bytes())
    report = fpcompiler.load(moved, backend="onnxruntime").verify()
    assert not report.ok
    assert "nothing was compared: there is no" in report.rows[0].detail


def test_a_changed_weight_fails_the_replay(portable, tmp_path) -> None:
    model, file = onnx.load(portable), tmp_path / "model.onnx"
    for tensor in model.graph.initializer:
        if tensor.name == "second.weight.codes":
            tensor.raw_data = bytes(byte ^ 0x77 for byte in tensor.raw_data)
    onnx.save(model, file)
    golden = portable.with_name("model.onnx.golden.safetensors")
    file.with_name(golden.name).write_bytes(golden.read_bytes())
    assert not fpcompiler.load(file, backend="onnxruntime").verify().ok


@pytest.mark.parametrize("attention", [None, pytest.param(ATTENTION, marks=pytest.mark.slow)])
def test_a_cache_lives_from_call_to_call(attention, tmp_path) -> None:
    case = own_cases()["cached"]
    model, args, _ = case.make()
    compiled = fpcompiler.compile(
        model, "w4a6", example_inputs=args, target="reference", attention=attention
    )
    compiled.export(tmp_path / "model.onnx", "onnx-portable")
    runs = fpcompiler.load(tmp_path / "model.onnx", backend="onnxruntime")
    calls = [(args, {}), *case.other_inputs()]
    compiled.reset()
    first = [runs(*args, **kwargs) for args, kwargs in calls]
    for (args, kwargs), found in zip(calls, first, strict=True):
        torch.testing.assert_close(found, compiled(*args, **kwargs), rtol=1e-5, atol=1e-5)
    assert runs.verify().ok  # which leaves the cache as it is
    last, kwargs = calls[-1]
    assert torch.equal(runs(*last, **kwargs), first[-1])
    runs.reset()
    assert torch.equal(runs(*calls[0][0]), first[0])


def cache_of_codes(text: str) -> Artifact:
    """Return a program that keeps packed codes and scales of rows, and gives their values."""
    operand, v = Operand.parse(text), value
    bits = operand.format.storage_bits
    codes, (scale,) = quantize(torch.ones(4, 36), operand)
    spec = {"t": "leaf"}
    plan = Plan(
        signature=Signature((Parameter("x", spec), Parameter("position", spec)), spec),
        placeholders=(
            Placeholder("x", "float32", ("rows", 36)), Placeholder("position", "int64", ("rows",))
        ),
        steps=(
            Step("fpc.quantize", (v("x"), text, "a.layer"), ("q", "s")),
            Step("fpc.pack", (v("q"), bits), ("p",)),
            Step("aten.index_copy.default", (v("codes"), 0, v("position"), v("p")), ("c",)),
            Step("aten.index_copy.default", (v("scales"), 0, v("position"), v("s")), ("t",)),
            Step("fpc.unpack", (v("c"), bits, 36), ("u",)),
            Step("fpc.dequantize", ([v("u"), v("t")], text, {"dtype": "float32"}), ("y",)),
        ),
        outputs=("y",),
        symbols={"rows": Symbol(1, 4)},
        state={"codes": "codes", "scales": "scales"},
        stores=(("c", "codes"), ("t", "scales")),
    )  # fmt: skip
    return Artifact(plan, {"codes": pack(codes, bits), "scales": scale})


@pytest.mark.parametrize("text", ["f4E2M1FN@token:f32", "f6E2M3FN@block16:f8E8M0FNU"])
def test_a_cache_of_packed_codes_is_kept_bit_for_bit(text, tmp_path) -> None:
    compiled = CompiledModel(cache_of_codes(text))
    compiled.export(tmp_path / "model.onnx", "onnx-portable")
    runs = fpcompiler.load(tmp_path / "model.onnx", backend="onnxruntime")
    for rows in ([2], [0, 3], [3, 1, 0]):
        call = torch.randn(len(rows), 36), torch.tensor(rows)
        assert torch.equal(runs(*call), compiled(*call))


@pytest.mark.parametrize(
    ("scheme", "method", "operator"),
    [
        ("w4a6", "rotate", "fpc.hadamard"),
        ("w=f4E2M1FN@row:f32,a=f4E2M1FN@tensor:f32", "search", "fpc.encode"),
    ],
)
def test_what_methods_put_into_a_program_is_computed_alike(
    scheme, method, operator, tmp_path
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    batches = [torch.randn(64, 64) for _ in range(2)]
    compiled = fpcompiler.compile(
        model.eval(), scheme, calibration=batches, method=method, target="reference"
    )
    assert operator in {step.op for step in compiled.artifact.plan.steps}
    compiled.export(tmp_path / "model.onnx", "onnx-portable")
    runs = fpcompiler.load(tmp_path / "model.onnx", backend="onnxruntime")
    torch.testing.assert_close(runs(batches[0]), compiled(batches[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_half_precision_is_kept(tmp_path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32)).half().eval()
    x = torch.randn(3, 64).half()
    compiled = fpcompiler.compile(model, example_inputs=(x,), target="reference")
    compiled.export(tmp_path / "model.onnx", "onnx-portable")
    found = fpcompiler.load(tmp_path / "model.onnx", backend="onnxruntime")(x)
    assert torch.equal(found, compiled(x))


def test_a_cache_that_does_not_begin_with_zeros_is_in_the_file(tmp_path) -> None:
    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(32, 32)
            self.register_buffer("total", torch.arange(32.0), persistent=False)

        def forward(self, x):
            self.total.add_(self.inner(x).sum(0))
            return self.total.clone()

    torch.manual_seed(0)
    x = torch.randn(2, 32)
    compiled = fpcompiler.compile(Sum().eval(), "w4a6", example_inputs=(x,), target="reference")
    compiled.export(tmp_path / "model.onnx", "onnx-portable")
    runs = fpcompiler.load(tmp_path / "model.onnx", backend="onnxruntime")
    compiled.reset()
    expected = [compiled(x), compiled(x)]
    for _ in range(2):
        torch.testing.assert_close([runs(x), runs(x)], expected, rtol=1e-5, atol=1e-5)
        runs.reset()


def test_a_file_that_onnxruntime_cannot_run_is_refused_with_the_way_out(standard) -> None:
    with pytest.raises(ArtifactError, match="no kernels for 4- and 6-bit types, and few for bf"):
        fpcompiler.load(standard, backend="onnxruntime")


def test_files_of_others_are_refused(tmp_path, portable) -> None:
    file = tmp_path / "other.onnx"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Abs", ["x"], ["y"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "other", [value], [result])
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), file)
    with pytest.raises(ArtifactError, match=r"it has no property 'fpcompiler'\. Write it with"):
        fpcompiler.load(file, backend="onnxruntime")
    with pytest.raises(ArtifactError, match=r"an ONNX file, for which load\(\) has backend="):
        fpcompiler.load(portable)
    with pytest.raises(ArtifactError, match="there is no file"):
        fpcompiler.load(tmp_path / "none.onnx", backend="onnxruntime")
    with pytest.raises(OptionError, match="there is no backend 'tensorrt'"):
        fpcompiler.load(portable, backend="tensorrt")
    with pytest.raises(OptionError, match="graphs and reproducible are for artifacts"):
        fpcompiler.load(portable, backend="onnxruntime", strict=True)
    file.write_bytes(b"PK no protobuf")
    with pytest.raises(ArtifactError, match="is no whole ONNX file"):
        fpcompiler.load(file, backend="onnxruntime")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"version": 2}, "another version of fpcompiler"),
        ({"plan": None}, "should have the fields|has no version|is not well formed"),
        ({"noise_db": "x"}, "lacks"),
    ],
)
def test_a_changed_property_is_refused(portable, tmp_path, change, cause) -> None:
    model, file = onnx.load(portable), tmp_path / "model.onnx"
    (entry,) = model.metadata_props
    entry.value = json.dumps({**json.loads(entry.value), **change})
    onnx.save(model, file)
    with pytest.raises(ArtifactError, match=cause):
        fpcompiler.load(file, backend="onnxruntime")


def test_a_missing_onnxruntime_or_device_is_named(portable, monkeypatch) -> None:
    with pytest.raises(TargetError, match=r"does not run on cuda; it has .*CPUExecution"):
        OnnxModel(portable, torch.device("cuda"))
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"pip install 'fpcompiler\[onnx\]'"):
        onnx_model.load_onnx(portable)
