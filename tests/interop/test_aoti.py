"""Packages of AOTInductor: run by processes that do not have fpcompiler, with the same bits."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fpcompiler
from fpcompiler.artifact import Artifact
from fpcompiler.cli.main import main
from fpcompiler.errors import ExportError, OptionError
from fpcompiler.interop.aoti import library as libraries
from fpcompiler.interop.aoti import write as writing
from fpcompiler.interop.aoti.program import _Quantizer, native_module
from fpcompiler.native import library
from fpcompiler.options import Options
from fpcompiler.runtime.fused import HEADS, TAILS, produce
from fpcompiler.runtime.inputs import bind
from fpcompiler.runtime.model import CompiledModel
from tests.models import own_cases

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
    pytest.mark.skipif(library() is None, reason="there is no native library"),
]

TORCH = Path(torch.__file__).parent


class Exact(nn.Module):
    """Between its layers there is nothing that torch could round in another way.

    Norms and activations stand in front of layers, so that the native library computes them, from
    tensors that lie in memory in all ways: rows of a larger tensor, transposed, broadcast.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(64, 96)
        # Names are written into C++.
        self.layers = nn.ModuleDict({'up "2"\\': nn.Linear(64, 96, bias=False)})
        self.down, self.last = nn.Linear(96, 64), nn.Linear(64, 33)
        self.norm = nn.LayerNorm(64)
        self.plain = nn.LayerNorm(64, elementwise_affine=False)

    def forward(self, x: Tensor, extra: dict[str, Tensor]) -> dict[str, Any]:
        x, z = x.chunk(2, -1)
        (up,) = self.layers.values()
        h = self.down(functional.silu(self.gate(x)) * up(x).transpose(0, 1))
        scale, shift = extra["parts"].chunk(2, -1)
        h = self.last(self.plain(h) * (1 + scale[:, None]) + shift[:, None])
        return {"y": h, "rest": [self.gate(self.norm(z))], "rows": x.shape[0], "two": 2}


def example(rows: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, rows, 128, generator=generator)
    return x, {"parts": torch.randn(rows, 128, generator=generator)}


@pytest.fixture(scope="module")
def exact() -> CompiledModel:
    n = torch.export.Dim("n", min=1, max=64)  # A square, so that a transposed tensor fits.
    dims = {"x": {0: n, 1: n}, "extra": {"parts": {0: n}}}
    return fpcompiler.compile(Exact().eval(), "w4a6", example_inputs=example(), dynamic=dims)


# Compiling one takes 20 seconds and more, so that tests of packages are slow.
@pytest.fixture(scope="module")
def package(exact: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aoti") / "a user's folder"
    folder.mkdir()
    file = folder / "model.pt2"
    written = exact.export(file, "aoti")
    assert written.files == (file,)
    assert written.facts["arguments"] == "x, extra"
    assert written.facts["check"] == "recorded call 0: SQNR inf dB, bit-equal"
    assert [*file.parent.iterdir()] == [file]
    return file


FRESH = """
import sys
sys.modules["fpcompiler"] = None
import torch
model = torch._inductor.aoti_load_package(sys.argv[1])
for rows in (1, 3, 8):
    x, extra = torch.load(f"{sys.argv[2]}/{rows}.pt")
    torch.save(model(x, extra), f"{sys.argv[2]}/{rows}.out.pt")
x[0, 1, 2] = float("nan")
try:
    model(x, extra)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_process_without_fpcompiler_gives_the_bits_of_the_native_backend(
    exact: CompiledModel, package: Path, tmp_path: Path
) -> None:
    for rows in (1, 3, 8):
        torch.save(example(rows), tmp_path / f"{rows}.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, str(package), str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rows in (1, 3, 8):
        expected, found = exact(*example(rows)), torch.load(tmp_path / f"{rows}.out.pt")
        assert [*found] == ["y", "rest", "rows", "two"]
        assert (found["rows"], found["two"]) == (rows, 2)
        assert torch.equal(found["y"], expected["y"])
        assert torch.equal(found["rest"][0], expected["rest"][0])
    assert re.search(
        r"layer 'gate': input holds NaN/Inf .* cannot be quantized to f6E2M3FN@block32:f8E8M0FNU",
        done.stdout,
    )


@pytest.mark.slow
def test_several_packages_and_fpcompiler_share_a_process(
    exact: CompiledModel, package: Path
) -> None:
    models = [torch._inductor.aoti_load_package(str(package)) for _ in range(2)]
    expected = exact(*example(5))
    for model in models:
        assert torch.equal(model(*example(5))["y"], expected["y"])


@pytest.mark.slow
def test_a_package_says_what_it_was_made_of(package: Path) -> None:
    loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
    assert loader.get_metadata()["fpcompiler.scheme"].startswith("w=f4E2M1FN")


PROGRAM = r"""
#include <ATen/ATen.h>
#include <fstream>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

at::Tensor read(const char* path, at::IntArrayRef sizes) {
    at::Tensor x = at::empty(sizes);
    std::ifstream(path, std::ios::binary).read((char*)x.data_ptr(), x.nbytes());
    return x;
}

int main(int, char** argv) {
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const auto y = model.run({read(argv[2], {4, 4, 128}), read(argv[3], {4, 128})});
    std::ofstream(argv[4], std::ios::binary).write((const char*)y[0].data_ptr(), y[0].nbytes());
}
"""


@pytest.mark.slow
def test_a_program_in_cpp_gives_the_same_bits(
    exact: CompiledModel, package: Path, tmp_path: Path
) -> None:
    (tmp_path / "main.cpp").write_text(PROGRAM)
    headers = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    linked = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    command = ["g++", "-std=c++20", "-O1", *headers, "main.cpp", *linked, "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    x, extra = example(4)
    x.numpy().tofile(tmp_path / "x")
    extra["parts"].numpy().tofile(tmp_path / "parts")
    run = [tmp_path / "main", package, *(tmp_path / name for name in ("x", "parts", "y"))]
    subprocess.run(run, check=True)
    y = torch.from_file(str(tmp_path / "y"), size=4 * 4 * 33).view(4, 4, 33)
    assert torch.equal(y, exact(x, extra)["y"])


def runs_alike(compiled: CompiledModel, *calls: tuple[Any, ...]) -> bool:
    """Return whether what a package is made of gives the bits of the native backend, in torch."""
    module = native_module(compiled.artifact)
    signature = compiled.artifact.plan.signature
    same = []
    for args in calls:
        leaves = bind(signature, args, {})
        found = torch.utils._pytree.tree_leaves(module(*module.arguments(leaves)))
        expected = torch.utils._pytree.tree_leaves(compiled(*args))
        same.append(all(map(torch.equal, found, expected)))
    return all(same)


@pytest.mark.parametrize("scheme", ["w4a6", "w4a16", "w4a4-row", "nvfp4", "mxfp6", "w4a8"])
@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_native_layers_of_any_scheme_and_target(scheme: str, target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 8)).eval()
    x = torch.randn(3, 64)
    compiled = fpcompiler.compile(model, scheme, example_inputs=(x,), target=target)
    native = CompiledModel(on_cpu(compiled.artifact))
    assert runs_alike(native, (x,), (torch.randn(1, 64),))


def on_cpu(artifact: Artifact) -> Artifact:
    steps = tuple(
        dataclasses.replace(s, kernel="cpu" if s.kernel else "") for s in artifact.plan.steps
    )
    return dataclasses.replace(artifact, plan=dataclasses.replace(artifact.plan, steps=steps))


def test_layers_of_several_kinds_read_one_quantizer() -> None:
    case = own_cases()["llama"]
    model, args, _ = case.make()
    compiled = fpcompiler.compile(model, "w4a6; *.q_proj: w=f6E2M3FN@row:f32", example_inputs=args)
    assert runs_alike(compiled, args, *(call for call, _ in case.other_inputs()))


def test_rotated_inputs_are_part_of_the_program() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.ReLU()).eval(), torch.randn(300, 64)
    compiled = fpcompiler.compile(
        model, "w4a4", method="rotate-gptq", calibration=[x], example_inputs=(x,)
    )
    assert any(step.op == "fpc.hadamard" for step in compiled.artifact.plan.steps)
    assert runs_alike(compiled, (x,), (x[:1],))


@pytest.mark.slow
def test_a_cache_is_updated_by_calls_and_new_in_each_loaded_package(tmp_path: Path) -> None:
    case = own_cases()["cached"]
    model, first, _ = case.make()
    compiled = fpcompiler.compile(model, "w4a6", example_inputs=first)
    compiled.export(tmp_path / "model.pt2", "aoti")
    for _ in range(2):
        package = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
        compiled.reset()
        for args, _ in [(first, {}), *case.other_inputs()]:
            assert torch.equal(package(*args), compiled(*args))


def test_what_has_no_native_operator_is_refused_by_name(tmp_path: Path) -> None:
    model, args, _ = own_cases()["llama"].make()
    compiled = fpcompiler.compile(
        model, "w4a6", example_inputs=args, attention="f8E4M3FN@token:f32"
    )
    with pytest.raises(ExportError, match=r"layer .*quantized attention.*Export to pt2"):
        compiled.export(tmp_path / "model.pt2", "aoti")
    assert not [*tmp_path.iterdir()]


def test_without_the_native_library_it_is_refused(
    exact: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "library", lambda: None)
    monkeypatch.setenv("FPC_NATIVE", "0")
    with pytest.raises(ExportError, match="FPC_NATIVE=0 switches the native library off"):
        exact.export(tmp_path / "model.pt2", "aoti")


@pytest.mark.slow
def test_a_package_that_gives_something_else_is_not_written(
    exact: CompiledModel, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*args: Any) -> None:
        shutil.copy(package, args[3])

    monkeypatch.setattr(writing, "_package", made)
    assert exact.export(tmp_path / "model.pt2", "aoti").files[0].is_file()
    (case,) = exact.artifact.golden
    outputs = (-value if value.is_floating_point() else value for value in case.outputs)
    wrong = dataclasses.replace(case, outputs=tuple(outputs))
    artifact = dataclasses.replace(exact.artifact, golden=(wrong,))
    with pytest.raises(ExportError, match=r"something else than the artifact, recorded call 0: SQ"):
        CompiledModel(artifact).export(tmp_path / "other.pt2", "aoti")
    assert [*tmp_path.iterdir()] == [tmp_path / "model.pt2"]


def test_what_torch_cannot_compile_is_said(
    exact: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("C++ compile error\n\nCommand:\ng++ a.cpp\n\na.cpp:1: error: no memory")

    monkeypatch.setattr(torch._inductor, "aot_compile", fails)
    with pytest.raises(ExportError, match=r"does not compile the program: a\.cpp:1: error: no mem"):
        exact.export(tmp_path / "model.pt2", "aoti")
    assert not [*tmp_path.iterdir()]


def test_a_folder_of_builds_that_cannot_be_written_is_an_error_before_the_work(
    exact: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="Point FPC_CACHE"):
        libraries.operators(tmp_path, Options(cache=tmp_path / "file"))


@pytest.mark.slow
def test_the_command(
    exact: CompiledModel,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(writing, "_package", lambda *args: shutil.copy(package, args[3]))
    exact.save(tmp_path / "model.fpc")
    file = str(tmp_path / "model.pt2")
    command = ["export", str(tmp_path / "model.fpc"), "--format", "aoti", "-o", file, "--json"]
    assert main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["load"] == "torch._inductor.aoti_load_package(path)"
    assert [*facts["files"]] == [file]


def test_names_of_producers_are_those_of_the_runtime() -> None:
    source = Path(libraries.__file__).with_name("operators.cpp").read_text()
    heads, tails = (
        re.findall(r'"(\w*)"', re.search(rf"{name}\[\] = \{{(.*?)\}};", source, re.DOTALL)[1])
        for name in ("kHeads", "kTails")
    )
    assert heads == [*HEADS]
    assert tails == [f"_{tail}" if tail else "" for tail in TAILS]


def test_what_the_library_does_not_take_is_computed_by_torch() -> None:
    x, weight = torch.randn(3, 64), torch.randn(64, dtype=torch.float64)
    given = (x, weight, None, None, None, "rms_norm_wide", 1e-5)
    (values, scale) = _Quantizer(1)(*given, "f6E2M3FN@block32:f8E8M0FNU", "layer")
    assert scale is None
    assert len(values.values) == 1
    assert torch.equal(values.values[0], produce(*given))
    kept, _ = _Quantizer(1)(x, weight.float(), *given[2:], "f6E2M3FN@block32:f8E8M0FNU", "layer")
    assert kept.values[0] is x
    with pytest.raises(
        ExportError, match=r"layer 'up': no native operator quantizes torch.float64"
    ):
        _Quantizer(1)(weight, "f6E2M3FN@block32:f8E8M0FNU", "up")
