"""Finding nvcc, and its command line."""

import pytest

from fpcompiler.codegen import nvcc
from fpcompiler.codegen.nvcc import find_nvcc
from fpcompiler.errors import DependencyError, TargetError
from fpcompiler.options import Options, compiler_environment
from tests.codegen.fake_nvcc import fake_nvcc, fake_toolkit, source


def test_cuda_home_says_which_one(tmp_path) -> None:
    found = fake_nvcc(tmp_path / "cuda", "12.9")
    assert found.path == tmp_path / "cuda" / "bin" / "nvcc"
    assert found.version == (12, 9)
    assert found.toolchain.startswith("nvcc V12.9.88, ")


def test_without_cuda_home_path_is_searched(tmp_path, monkeypatch) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("PATH", str(home / "bin"), prepend=":")
    assert find_nvcc(Options()).path == home / "bin" / "nvcc"


def test_no_nvcc_names_the_place_and_what_to_do(tmp_path, monkeypatch) -> None:
    with pytest.raises(DependencyError, match=rf"no nvcc in {tmp_path}.*12\.8 or newer.*CUDA_HOME"):
        find_nvcc(Options(cuda_home=tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvcc, "_FALLBACK", tmp_path)
    with pytest.raises(DependencyError, match=r"no nvcc in PATH and .* No GPU and no driver"):
        find_nvcc(Options())


def test_an_old_one_is_refused(tmp_path) -> None:
    with pytest.raises(DependencyError, match=r"is nvcc 12\.6; FP4 needs 12\.8"):
        fake_nvcc(tmp_path / "cuda", "12.6")


def test_another_program_is_refused(tmp_path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    (home / "bin" / "nvcc").write_text("#!/bin/sh\necho hello\n", encoding="utf-8")
    with pytest.raises(DependencyError, match=r"is no nvcc: --version printed 'hello'"):
        find_nvcc(Options(cuda_home=home))


def test_a_family_needs_a_newer_one(tmp_path) -> None:
    old = fake_nvcc(tmp_path / "cuda", "12.8")
    assert "-gencode=arch=compute_100a,code=[sm_100a,compute_100a]" in old.compile_flags("sm_100a")
    with pytest.raises(TargetError, match=r"sm_100f needs nvcc 12\.9 or newer.* is 12\.8"):
        old.compile_flags("sm_100f")


def test_the_command_line_stands_in_the_log(tmp_path) -> None:
    found = fake_nvcc(tmp_path / "cuda")
    (tmp_path / "kernel.cu").write_text("int main;", encoding="utf-8")
    cost = found.compile(source(), tmp_path)
    assert cost is not None
    assert cost.peak_mb > 0
    assert found.link(tmp_path, "shared", "other.so") is not None
    lines = (tmp_path / "build.log").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"{found.path} -std=c++17 -O3")
    assert lines[0].endswith("-c kernel.cu -o kernel.o")
    assert lines[-1].endswith("-cudart shared kernel.o -o other.so")


def test_variables_that_add_flags_do_not_reach_nvcc() -> None:
    env = {"PATH": "/bin", "NVCC_APPEND_FLAGS": "-G", "NVCC_PREPEND_FLAGS": "-g", "NVCC_CCBIN": "x"}
    assert compiler_environment(env) == {"PATH": "/bin"}
