"""The script that compares the model with a Hopper GPU, as far as it goes without one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.benchmarks import tensor_core_model as script


def small(family: str) -> script.Problem:
    return script.Problem(family, (64, 8, 64), 0)


def test_there_are_fifty_problems_and_more() -> None:
    problems = list(script.problems())
    assert len(set(problems)) == len(problems) >= 50
    assert {p.family for p in problems} == set(script.FAMILIES)
    for m, n, k in {p.size for p in problems}:
        assert (m % 64, n % 16, k % 32) == (0, 0, 0)


@pytest.mark.parametrize("family", script.FAMILIES)
def test_operands_are_finite_and_the_same_each_time(family: str) -> None:
    problem = small(family)
    a, b = problem.operands()
    again = problem.operands()
    assert a.shape == (64, 64)
    assert b.shape == (8, 64)
    assert a.dtype in (torch.float8_e4m3fn, torch.bfloat16)
    for x, y in zip((a, b), again, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        assert x.float().isfinite().all()
    assert script.model(a, b).any()


def test_one_bit_of_one_number_is_found() -> None:
    def off(a: Tensor, b: Tensor) -> Tensor:
        result = script.model(a, b)
        result.view(torch.int32)[3, 5] ^= 1
        return result

    row = script.compare(small("bf16, gaussian"), off, script.model, "cpu")
    assert (row["differing"], row["differing_cublas"]) == (1, 0)
    assert row["first_difference"]["at"] == [3, 5]
    right = script.compare(small("bf16, gaussian"), script.model, off, "cpu")
    assert (right["differing"], right["differing_cublas"]) == (0, 1)
    assert right["first_difference"] is None


@pytest.mark.nvcc
def test_the_kernel_compiles_to_the_instructions(tmp_path: Path) -> None:
    assert script.build(tmp_path).is_file()
    flags = [flag for flag in script.FLAGS if flag.startswith(("-std", "-O"))]
    ptx = tmp_path / "kernel.ptx"
    command = ["nvcc", *flags, "-arch=sm_90a", "--ptx", str(script.SOURCE), "-o", str(ptx)]
    subprocess.run(command, check=True)
    text = ptx.read_text()
    assert "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3" in text
    assert "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16" in text


@pytest.mark.gpu
def test_the_model_equals_the_gpu(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper has wgmma")
    kernel = script.wgmma(script.build(tmp_path))
    for family in script.FAMILIES:
        row = script.compare(small(family), kernel, script.model, "cuda")
        assert row["differing"] == 0, row


def test_without_the_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["script", "--output", str(tmp_path / "record.json")])
    with pytest.raises(SystemExit, match="this needs an H100 or H200"):
        script.main()
    assert not (tmp_path / "record.json").exists()
