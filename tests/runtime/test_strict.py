"""With ``strict``, what would run without the kernels of its target is an error that says why."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler import native
from fpcompiler.cli.main import main
from fpcompiler.errors import TargetError
from fpcompiler.native import loading
from fpcompiler.operand import Operand
from fpcompiler.runtime import native_steps, onednn
from fpcompiler.runtime.strict import require_kernels

X = torch.linspace(-1, 1, 3 * 32).view(3, 32)
needs_library = pytest.mark.skipif(
    native.why_missing() is not None, reason="the native library was not built"
)


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.b(self.a(x))))
        return result


def compiled(scheme: str = "w4a6", **options) -> fpcompiler.CompiledModel:
    return fpcompiler.compile(Three().eval(), scheme, example_inputs=(X,), **options)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("FPC_NATIVE", "FPC_NATIVE_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(loading, "PATH", tmp_path / "libfpc.so")
    native.library.cache_clear()
    yield
    monkeypatch.undo()
    native.library.cache_clear()
    onednn.usable.cache_clear()


@needs_library
def test_what_the_library_runs_is_loaded_and_gives_the_same(tmp_path: Path) -> None:
    model = compiled(strict=True)  # The head stays in high precision.
    model.save(tmp_path / "m.fpc")
    loaded = fpcompiler.load(tmp_path / "m.fpc", strict=True)
    assert torch.equal(loaded(X), model(X))
    assert main(["run", str(tmp_path / "m.fpc"), "--random", "--strict"]) == 0


@pytest.fixture
def takes_no_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = native_steps.takes

    def narrower(w_operand: Operand, *rest: int) -> bool:
        return w_operand.format.name != "f8E4M3FN" and takes(w_operand, *rest)

    monkeypatch.setattr(native_steps, "takes", narrower)


@needs_library
def test_formats_that_the_library_does_not_take_are_named(
    tmp_path: Path, capsys, takes_no_e4m3
) -> None:
    scheme = "w4a6; b: w=e4m3@row:f32,a=e2m3@token:f32"
    with pytest.raises(TargetError) as caught:
        compiled(scheme, strict=True)
    assert str(caught.value) == (
        "strict: layers of the target cpu that the native library would not run: b: it takes no "
        "weights in f8E4M3FN; give them four bits. Without strict they run more slowly, with the "
        "same meaning."
    )
    path = tmp_path / "m.fpc"
    compiled(scheme).save(path)
    with pytest.raises(TargetError, match="would not run: b: "):
        fpcompiler.load(path, strict=True)
    for command in (["run", str(path), "--random"], ["bench", str(path), "--iterations", "1"]):
        assert main(command) == 0
        capsys.readouterr()
        assert main([*command, "--strict"]) == 1
        assert "would not run: b: it takes no weights" in capsys.readouterr().err


def test_without_the_library_nothing_is_compiled_or_loaded(tmp_path: Path, without_library) -> None:
    with pytest.raises(TargetError, match=r"strict: no layer .* not built: install a C\+\+ comp"):
        compiled(strict=True)
    compiled().save(tmp_path / "m.fpc")
    with pytest.raises(TargetError, match=r"would not run: a, b: the native library was not built"):
        fpcompiler.load(tmp_path / "m.fpc", strict=True)
    fpcompiler.load(tmp_path / "m.fpc")


def test_the_reference_is_no_fallback_where_it_is_the_target(without_library) -> None:
    assert compiled(target="reference", strict=True)(X).shape == (3, 8)


def test_another_device_is_one() -> None:
    artifact = compiled().artifact
    with pytest.raises(TargetError, match="a, b: it runs on the CPU only, not on cuda:0"):
        require_kernels(artifact.plan, artifact.tensors, torch.device("cuda:0"))


@needs_library
def test_a_model_that_the_first_call_captures_is_strict_too(monkeypatch, takes_no_e4m3) -> None:
    model = fpcompiler.compile(Three().eval(), "w4a6; b: w=e4m3@row:f32,a=none", strict=True)
    with pytest.raises(TargetError, match="would not run: b: "):
        model(X)
    good = compiled(strict=True)
    monkeypatch.setenv("FPC_NATIVE", "0")
    with pytest.raises(TargetError, match="a, b: FPC_NATIVE=0 switches"):
        copy.deepcopy(good)


def test_many_layers_are_counted() -> None:
    artifact = fpcompiler.compile(
        nn.Sequential(*(nn.Linear(16, 16) for _ in range(8))).eval(), example_inputs=X[:, :16]
    ).artifact
    with pytest.raises(TargetError, match="run: 0, 1, 2, 3, 4 and 3 more: it runs on the CPU"):
        require_kernels(artifact.plan, artifact.tensors, torch.device("cuda"))
