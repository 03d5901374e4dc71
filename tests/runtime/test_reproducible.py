"""``reproducible=True``: the same bits where sums and functions are computed otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpcompiler
from fpcompiler.errors import OptionError
from fpcompiler.huggingface import CachedDecoder
from fpcompiler.native import library
from fpcompiler.numerics import sqnr_db
from fpcompiler.plan import Step
from fpcompiler.runtime.operators import resolve
from fpcompiler.runtime.reproducible import EXACT, Widened, reproducible
from tests.hf_models import hf_model

ROOT = Path(__file__).parents[2]
RUN = """
import sys, torch, fpcompiler
model = fpcompiler.load(sys.argv[1], reproducible=sys.argv[2] == "True")
torch.save([model(*call) for call in torch.load(sys.argv[3])], sys.argv[4])
"""
OTHER_MACHINE = {
    "ATEN_CPU_CAPABILITY": "default", "DNNL_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"
}  # fmt: skip
"""Torch without vectors, so with other sums and functions of a library."""


def step(op: str, **kwargs: float) -> Step:
    return Step(op=op, args=(), kwargs=kwargs, outs=("y",))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bf16 with its cache; attention is one operator, or products and softmax."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "attn_implementation": request.param}
    decoder = CachedDecoder(hf_model("hf-llama", **sizes).bfloat16(), 1, 48, last_logits=1)
    example = torch.arange(8)[None], torch.arange(8)
    path = tmp_path_factory.mktemp("artifact") / f"{request.param}.fpc"
    compiled = fpcompiler.compile(decoder, "w4a6-row", example_inputs=example, target="cpu")
    compiled.save(path)
    return path


def calls() -> list[tuple[Tensor, Tensor]]:
    """A prompt, and tokens behind it."""
    tokens = torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(3))
    begins = [0, 24, *range(25, 40)]
    ends = [*begins[1:], 40]
    return [(tokens[:, a:b], torch.arange(a, b)) for a, b in zip(begins, ends, strict=True)]


def on_other_machine(artifact: Path, same: bool, folder: Path) -> list[Tensor]:
    given, found = folder / "calls.pt", folder / "found.pt"
    torch.save(calls(), given)
    command = [sys.executable, "-c", RUN, artifact, str(same), given, found]
    env = {**os.environ, **OTHER_MACHINE, "PYTHONPATH": str(ROOT)}
    subprocess.run([str(word) for word in command], env=env, check=True, capture_output=True)
    results: list[Tensor] = torch.load(found)
    return results


needs_native = pytest.mark.skipif(library() is None, reason="the native library is not built")


@needs_native
def test_two_machines_give_the_same_bits(artifact: Path, tmp_path: Path) -> None:
    model, plain = fpcompiler.load(artifact, reproducible=True), fpcompiler.load(artifact)
    here = [model(*call) for call in calls()]
    usual = [plain(*call) for call in calls()]
    there = on_other_machine(artifact, True, tmp_path)
    assert all(map(torch.equal, here, there))
    # Products of bf16 and a softmax may be rounded to the same bf16 all the same.
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT" and artifact.stem == "sdpa":
        assert not all(map(torch.equal, usual, on_other_machine(artifact, False, tmp_path)))
    # Still the same model.
    assert min(sqnr_db(a.float(), b.float()) for a, b in zip(usual, here, strict=True)) > 15
    assert model.verify().ok


def test_torch_compile_changes_nothing(artifact: Path) -> None:
    model = fpcompiler.load(artifact, reproducible=True)
    expected = model(*calls()[0])
    model.reset()
    assert torch.equal(torch.compile(model)(*calls()[0]), expected)


def test_layers_whose_sums_are_rounded_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    for scheme, warns in (("w4a6-row", False), ("w4a8-row", True), ("w4a6", True)):
        path = tmp_path / f"{scheme}.fpc"
        fpcompiler.compile(model, scheme, example_inputs=(x,), target="cpu").save(path)
        caplog.clear()
        fpcompiler.load(path, reproducible=True)
        assert ("the sums of layer '0' (w=" in caplog.text) == warns


@needs_native
def test_programs_of_the_native_library_do_not_run(artifact: Path) -> None:
    model = fpcompiler.load(artifact, reproducible=True)
    assert model._ready()._programs is None
    assert fpcompiler.load(artifact)._ready()._programs is not None


def test_what_is_compiled_would_round_less_often(artifact: Path) -> None:
    with pytest.raises(OptionError, match="or do not call compile_rest"):
        fpcompiler.load(artifact, reproducible=True).compile_rest()


def test_exact_operators_are_left_as_they_are() -> None:
    for op in ("aten.add.Tensor", "aten.reshape.default", "aten.gt.Scalar", "fpc.linear"):
        assert reproducible(step(op), resolve(op)) is resolve(op)
    assert all(hasattr(torch.ops.aten, name) for name in EXACT)


@pytest.mark.parametrize(
    "inexact",
    [
        step("aten.add.Tensor", alpha=0.1),
        replace(step("aten.rsub.Scalar"), args=({"v": "x"}, 1.0, 0.3)),
        replace(step("aten.index_put.default"), args=({"v": "x"}, [], {"v": "y"}, True)),
        step("aten.scatter.reduce"),
        step("aten.div.Tensor"),
        step("aten.arange.start_step"),
    ],
    ids=lambda given: given.op,
)
def test_some_operators_are_exact_with_other_arguments_only(inexact: Step) -> None:
    assert isinstance(reproducible(inexact, torch.add), Widened)


def test_operators_without_fp64_are_refused() -> None:
    with pytest.raises(OptionError, match=r"layer 'moe' needs aten\._grouped_mm"):
        reproducible(replace(step("aten._grouped_mm.default"), layer="moe"), torch.add)


X = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Any, ...]] = {
    "aten.cos.default": (X,), "aten.mean.dim": (X, [-1]), "aten.linear.default": (X, X),
    "aten.logsumexp.default": (X, [0]), "aten.softmax.int": (X, -1),
    "aten.softmax.int-as": (X, -1, torch.float32), "aten.sum.dim_IntList": (X, [0]),
    "aten.div.Scalar": (X, 3.0), "aten.div.Scalar-of-integers": (torch.arange(40), 3),
    "aten.var_mean.correction": (X, [1]), "aten.linspace.default": (0.1, 0.9, 30),
    "aten.fft_rfft.default": (X,), "aten.polar.default": (X.abs(), X),
    "aten.abs.default-of-complex": (torch.complex(X, X),), "aten.cumsum.default": (X.int(), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_rounded_once_to_their_type(dtype: torch.dtype, name: str) -> None:
    if dtype == torch.bfloat16 and ("fft" in name or "polar" in name or "complex" in name):
        pytest.skip("torch has it in fp32 only")

    def moved(x: Any, to: torch.dtype) -> Any:
        return x.to(to) if isinstance(x, Tensor) and x.is_floating_point() else x

    def widest(x: Any) -> Any:
        if isinstance(x, torch.dtype):
            return torch.float64
        if isinstance(x, Tensor):
            return x.to(torch.complex128) if x.is_complex() else x.double()
        return x

    function = resolve(name.partition("-")[0])
    args = tuple(moved(x, dtype) for x in CASES[name])
    plain, found = function(*args), Widened(function)(*args)
    if "cumsum" in name:
        assert torch.equal(plain, found)
        return
    exact = function(*map(widest, args))
    if isinstance(plain, Tensor):
        plain, found, exact = (plain,), (found,), (exact,)
    for p, f, e in zip(plain, found, exact, strict=True):
        assert f.dtype == p.dtype
        if name != "aten.linspace.default":  # which has no tensor that could be wider
            assert torch.equal(f, e.to(p.dtype))


def test_a_type_that_is_asked_for_by_name_is_given() -> None:
    x = torch.randn(9, 50).bfloat16()
    found = Widened(resolve("aten.softmax.int"))(x, -1, dtype=torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.softmax(x.double(), -1).float())
