"""fpcompiler.compile and load, as a user calls them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.errors import (
    CaptureError,
    FormatError,
    NumericsError,
    OptionError,
    PassError,
    RunError,
    TargetError,
)
from fpcompiler.passes import default_pipeline
from fpcompiler.scheme import Scheme
from tests.models import CachedAttention, Llama, normal, token_ids
from tests.passes.tiny import Attention, Mlp, tiny

ROOT = Path(__file__).parents[1]
X = normal(3, 32)


def error(result: Tensor, expected: Tensor) -> float:
    """Return the relative error; 4-bit weights alone give about 0.1 for each layer in a row."""
    result, expected = result.detach().double(), expected.detach().double()
    return float((result - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny(Mlp)


@pytest.fixture(scope="module")
def compiled(model) -> fpcompiler.CompiledModel:
    return fpcompiler.compile(model, example_inputs=X)


def test_compile_save_load_and_run(model, compiled, tmp_path: Path) -> None:
    y = compiled(X)
    assert 0 < error(y, model(X)) < 0.25
    compiled.save(tmp_path / "model.fpc")
    same = fpcompiler.load(tmp_path / "model.fpc")
    for rows in (1, 2, 40):
        x = normal(rows, 32, seed=rows)
        assert torch.equal(same(x), compiled(x))
    assert same.verify().ok
    assert same.scheme == compiled.scheme == str(Scheme.parse("w4a6"))
    assert str(same.plan()) == str(compiled.plan())
    assert [row.quantized for row in same.plan().rows] == [True, True, False]
    rows = same.compare(model, [X]).rows
    assert [row.name for row in rows if row.kind == "layer"] == ["up", "down", "lm_head"]


def test_the_first_call_captures_when_there_is_no_example(model, compiled, tmp_path: Path) -> None:
    lazy = fpcompiler.compile(model, scheme="w4a6")
    with pytest.raises(RunError, match="captured by its first call"):
        lazy.save(tmp_path / "model.fpc")
    assert torch.equal(lazy(X), compiled(X))
    assert torch.equal(lazy(x=normal(7, 32)), compiled(normal(7, 32)))
    lazy.save(tmp_path / "model.fpc")


@pytest.mark.parametrize(
    "example",
    [
        {"example_inputs": X},
        {"example_inputs": (X,)},
        {"example_inputs": [X]},
        {"example_kwargs": {"x": X}},
        {"calibration": [X, X]},
        {"calibration": iter([(X,)])},
        {"calibration": [{"x": X}]},
        {"calibration": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), 2)},
    ],
    ids=["tensor", "tuple", "list", "kwargs", "tensors", "tuples", "dicts", "loader"],
)
def test_every_form_of_an_example_gives_the_same_program(model, compiled, example) -> None:
    other = fpcompiler.compile(model, "w4a6", **example)
    assert torch.equal(other(X), compiled(X))
    assert other.artifact.golden


def test_an_exported_program_is_compiled_at_once(model, compiled) -> None:
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (X,), dynamic_shapes={"x": {0: batch}})
    one = fpcompiler.compile(exported, "w4a6")
    assert torch.equal(one(X), compiled(X))
    assert torch.equal(one.artifact.golden[0].inputs[0], X)  # its own example inputs
    exported.example_inputs = None
    assert not fpcompiler.compile(exported, "w4a6").artifact.golden
    assert fpcompiler.compile(exported, "w4a6", example_inputs=X).artifact.golden


def test_schemes_may_be_mixed_and_come_as_text_recipe_file_or_object(model, tmp_path: Path) -> None:
    text = "w4a6,skip=none; down: w4a16; re:lm_.*: nvfp4"
    recipe = {
        "scheme": "w4a6",
        "skip": [],
        "rules": [{"match": "down", "scheme": "w4a16"}, {"match": "re:lm_.*", "scheme": "nvfp4"}],
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    forms = [text, recipe, tmp_path / "recipe.json", str(tmp_path / "recipe.json"), Scheme.of(text)]
    results = [fpcompiler.compile(model, form, example_inputs=X) for form in forms]
    assert len({one.scheme for one in results}) == 1
    assert all(torch.equal(one(X), results[0](X)) for one in results)
    rows = {row.name: (row.weight, row.activation) for row in results[0].plan().rows}
    assert rows["up"][1] == "f6E2M3FN@block32:f8E8M0FNU"
    assert rows["down"] == ("f4E2M1FN@row:f32/block32:f8E8M0FNU", "f32")
    assert rows["lm_head"] == ("f4E2M1FN@tensor:f32/block16:f8E4M3FN",) * 2


def test_a_rule_that_matches_nothing_is_warned_of(model) -> None:
    with pytest.warns(UserWarning, match="The rule 'dwon' of the scheme matches no layer"):
        fpcompiler.compile(model, "w4a6; dwon: skip; up: skip", example_inputs=X)


def test_dumps_go_to_the_folder(model, tmp_path: Path) -> None:
    one = fpcompiler.compile(model, example_inputs=X, dump_dir=tmp_path / "a" / "b")
    assert one.dumps == tmp_path / "a" / "b"
    names = {file.name for file in one.dumps.iterdir()}
    assert {"00-captured.mlir", "numerics.json", "timing.json", "pipeline.txt"} <= names
    assert fpcompiler.compile(model, example_inputs=X).dumps is None


def test_each_compilation_gets_a_folder_of_its_own_in_fpc_dump(
    model, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("FPC_DUMP", str(tmp_path))
    lazy = [fpcompiler.compile(model), fpcompiler.compile(model)]
    assert [one.dumps.name for one in lazy] == ["compile-001", "compile-002"]
    lazy[1](X)
    assert (tmp_path / "compile-002" / "00-captured.mlir").is_file()
    assert not list((tmp_path / "compile-001").iterdir())


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_a_folder_for_dumps_that_cannot_be_written_is_refused(
    model, tmp_path: Path, monkeypatch, by: str
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    folder = file / "dumps"
    options: dict[str, Path] = {"dump_dir": folder} if by == "argument" else {}
    if by == "variable":
        monkeypatch.setenv("FPC_DUMP", str(folder))
    with pytest.raises(OptionError, match=re.escape(str(folder))):
        fpcompiler.compile(model, example_inputs=X, **options)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.up(x)
        return {"y": y, "none": None, "nested": [y + 1, (2, None)], "rows": x.shape[0], "k": True}


def test_a_result_may_hold_none_and_numbers(tmp_path: Path) -> None:
    compiled = fpcompiler.compile(tiny(Mixed), example_inputs=normal(4, 32))
    compiled.save(tmp_path / "model.fpc")
    x = normal(3, 32)
    for form in (compiled, fpcompiler.load(tmp_path / "model.fpc")):
        result = form(x)
        assert list(result) == ["y", "none", "nested", "rows", "k"]
        assert torch.equal(result["nested"][0], result["y"] + 1)
        assert result["nested"][1] == (2, None)
        assert (result["none"], result["rows"], result["k"]) == (None, 3, True)
        assert form.verify().ok


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.up(torch.cat([x, x])) + y


def test_a_size_may_be_a_multiple_of_another_one() -> None:
    size = torch.export.Dim("size", min=2, max=100)
    compiled = fpcompiler.compile(
        tiny(Doubled),
        example_inputs=(normal(20, 8), normal(40, 8)),
        dynamic={"x": {0: size}, "y": {0: 2 * size}},
    )
    assert compiled(normal(3, 8), normal(6, 8)).shape == (6, 8)
    assert compiled.verify().ok


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 8, 3)
        self.two = nn.Conv2d(1, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.two(self.one(x)[:, None]))


def test_convolutions_are_compared_layer_by_layer() -> None:
    model, x = tiny(Convolutions), normal(2, 4, 10)
    table = fpcompiler.compile(model, example_inputs=x).compare(model, [x, x])
    assert [(row.name, row.calls, row.reason) for row in table.rows] == [
        (name, 2, "") for name in ("one", "two", "up", "output")
    ]
    assert all(row.sqnr_db is not None and row.sqnr_db > 10 for row in table.rows)


def test_threads_may_compile_at_the_same_time(model, compiled) -> None:
    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(lambda _: fpcompiler.compile(model, example_inputs=X), range(3)))
    assert all(torch.equal(each(X), compiled(X)) for each in models)


def test_a_pipeline_of_ones_own(model) -> None:
    kept = fpcompiler.compile(model, example_inputs=X, pipeline="cse,normalize,symbol-dce")
    assert torch.equal(kept(X), model(X))
    assert kept.plan().rows == ()
    with pytest.raises(PassError, match="There is no pass 'cs'"):
        fpcompiler.compile(model, example_inputs=X, pipeline="cs")


def bad_weight() -> nn.Module:
    model = tiny(Mlp)
    model.up.weight.data[0, 0] = float("nan")
    return model


ERRORS = {
    "scheme": (FormatError, "There is no scheme 'w4a7'", lambda m: (m, "w4a7"), {}),
    "scheme-type": (OptionError, "a scheme cannot be a int", lambda m: (m, 4), {}),
    "target": (TargetError, "There is no target 'gpu'", lambda m: (m,), {"target": "gpu"}),
    "target-of-a-plan": (
        TargetError,
        "layer 'up' .* cannot run on sm_90a: its kernels stand beside a plan",
        lambda m: (m,),
        {"pipeline": default_pipeline("w4a6", "sm_90a"), "example_inputs": X},
    ),
    "targets-twice": (OptionError, "each once", lambda m: (m,), {"target": "cpu,cpu"}),
    "two-plans": (
        OptionError,
        "a plan is for one of cpu",
        lambda m: (m,),
        {"target": ["cpu", "reference"]},
    ),
    "nan": (
        NumericsError,
        "layer 'up': input holds NaN/Inf",
        lambda m: (bad_weight(),),
        {"example_inputs": X},
    ),
    "no-calibration": (
        OptionError,
        "the calibration data is empty; give at least one batch",
        lambda m: (m,),
        {"calibration": []},
    ),
    "no-module": (
        CaptureError,
        "The model is a function; expected a torch.nn.Module",
        lambda m: (lambda x: x,),
        {},
    ),
    "example": (CaptureError, "do not fit Mlp.forward", lambda m: (m,), {"example_inputs": (X, X)}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_ours_and_name_the_cause(model, name: str) -> None:
    kind, message, arguments, options = ERRORS[name]
    with pytest.raises(kind, match=message) as caught:
        fpcompiler.compile(*arguments(model), **options)
    assert isinstance(caught.value, fpcompiler.FpcompilerError)


def test_activations_that_are_no_numbers_name_the_layer(compiled) -> None:
    x = X.clone()
    x[0, 0] = float("inf")
    with pytest.raises(NumericsError, match="layer 'up': input holds NaN/Inf"):
        compiled(x)


def test_torch_compile_sees_one_graph(compiled) -> None:
    function = torch.compile(compiled, backend="eager", fullgraph=True)
    assert torch.equal(function(X), compiled(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model, x = tiny(Attention).to(dtype), normal(2, 5, 32).to(dtype)
    one = fpcompiler.compile(model, "w4a6", example_inputs=x)
    y = one(x)
    assert y.dtype is dtype
    assert error(y, model(x)) < 0.15
    assert {row.bytes_before for row in one.plan().rows} == {32 * 32 * 2}


def test_a_decoder_with_a_cache_saves_loads_and_resets(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CachedAttention().eval()
    calls = [
        (normal(1, last - first, 64, seed=first), torch.arange(first, last))
        for first, last in ((0, 4), (4, 5), (5, 6))
    ]
    one = fpcompiler.compile(model, "w4a8", example_inputs=calls[0])
    assert not model.k_cache.any()  # neither the capture nor the recorded call wrote to it
    first = [one(*call) for call in calls]
    assert not model.k_cache.any()
    with torch.no_grad():
        expected = [model(*call) for call in calls]
    assert all(error(a, b) < 0.3 for a, b in zip(first, expected, strict=True))
    assert not torch.equal(one(*calls[1]), first[0][:, :1])

    one.save(tmp_path / "decoder.fpc")
    same = fpcompiler.load(tmp_path / "decoder.fpc")
    assert all(torch.equal(same(*call), y) for call, y in zip(calls, first, strict=True))
    one.reset()
    model.k_cache.fill_(7.0)  # the model goes on with its own cache
    assert all(torch.equal(one(*call), y) for call, y in zip(calls, first, strict=True))
    assert same.verify().ok


def test_the_model_is_left_as_it_was() -> None:
    model = tiny(Mlp).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fpcompiler.compile(model, example_inputs=X)(X)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_two_compilations_are_equal_to_the_byte(tmp_path: Path) -> None:
    files = []
    for name in ("a.fpc", "b.fpc"):
        fpcompiler.compile(tiny(Attention), example_inputs=normal(1, 4, 32)).save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


RUN = """
import sys, torch, fpcompiler
model = fpcompiler.load(sys.argv[1])
print(model(torch.arange(8).view(1, 8)).double().sum().item().hex())
compiler = ("torch_mlir", "transformers", "fpcompiler.ir", "fpcompiler.passes",
            "fpcompiler.capture", "fpcompiler.codegen", "fpcompiler.scheme", "tests")
print([name for name in sys.modules if name.startswith(compiler)])
"""


def test_a_new_process_runs_the_artifact_without_compiler_and_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Llama(layers=1).eval()
    one = fpcompiler.compile(model, "w4a6", example_inputs=token_ids(2, 12))
    one.save(tmp_path / "model.fpc")
    command = [sys.executable, "-c", RUN, "model.fpc"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, modules = done.stdout.splitlines()
    assert float.fromhex(total) == one(torch.arange(8).view(1, 8)).double().sum().item()
    assert modules == "[]"


def test_compiling_warns_of_nothing(model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fpcompiler.compile(model, "w4a6; up: w4a8", example_inputs=X)
