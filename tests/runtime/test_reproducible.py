"""``reproducible=True``: the same bits where sums and functions are computed otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

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


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bf16 with its cache."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "attn_implementation": "sdpa"}
    decoder = CachedDecoder(hf_model("hf-llama", **sizes).bfloat16(), 1, 48, last_logits=1)
    example = torch.arange(8)[None], torch.arange(8)
    path = tmp_path_factory.mktemp("artifact") / "llama.fpc"
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
    assert not all(map(torch.equal, usual, on_other_machine(artifact, False, tmp_path)))
    # Still the same model.
    assert min(sqnr_db(a.float(), b.float()) for a, b in zip(usual, here, strict=True)) > 15


@needs_native
def test_programs_of_the_native_library_do_not_run(artifact: Path) -> None:
    model = fpcompiler.load(artifact, reproducible=True)
    assert model._ready()._programs is None
    assert fpcompiler.load(artifact)._ready()._programs is not None


def test_what_is_compiled_would_round_less_often(artifact: Path) -> None:
    with pytest.raises(OptionError, match="Load the model without one of them"):
        fpcompiler.load(artifact, reproducible=True).compile_rest()


def test_exact_operators_are_left_as_they_are() -> None:
    for op in ("aten.add.Tensor", "aten.reshape.default", "aten.embedding.default", "fpc.linear"):
        assert reproducible(step(op), resolve(op)) is resolve(op)
    assert isinstance(reproducible(step("aten.add.Tensor", alpha=0.1), torch.add), Widened)
    assert all(hasattr(torch.ops.aten, name) for name in EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_rounded_once_to_their_type(dtype: torch.dtype) -> None:
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    for op, args in (
        ("aten.cos.default", (x,)), ("aten.mean.dim", (x, [-1])), ("aten.linear.default", (x, x)),
        ("aten.logsumexp.default", (x, [0])),
    ):  # fmt: skip
        function = resolve(op)
        found = reproducible(step(op), function)(*args)
        exact = function(*(a.double() if isinstance(a, Tensor) else a for a in args))
        assert found.dtype == dtype
        assert torch.equal(found, exact.to(dtype))


def test_a_type_that_is_asked_for_is_given() -> None:
    x = torch.randn(9, 50).bfloat16()
    softmax = Widened(resolve("aten.softmax.int"))
    found = softmax(x, -1, dtype=torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.softmax(x.double(), -1).float())
    assert Widened(resolve("aten.cumsum.default"))(torch.arange(4), 0).dtype == torch.int64
