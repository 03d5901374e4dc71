"""``fpcompiler doctor``: honest about what is there, and helpful about what is not."""

import ctypes
import importlib.metadata
import json
import platform

import pytest

from fpcompiler import native
from fpcompiler.cli import doctor
from fpcompiler.cli.main import main
from fpcompiler.codegen.proof import disassembly
from fpcompiler.native import loading


@pytest.fixture
def checks(capsys):
    def run():
        code = main(["doctor", "--json"])
        return code, {row["name"]: row for row in json.loads(capsys.readouterr().out)}

    return run


def test_it_finds_what_these_tests_run_with(checks) -> None:
    code, rows = checks()
    assert code == 0
    assert rows["Python"]["found"] == platform.python_version()
    assert rows["torch"]["found"] == importlib.metadata.version("torch")
    assert rows["torch-mlir"]["ok"]
    assert all(row["enables"] and row["fix"] for row in rows.values())


def test_a_missing_package_comes_with_the_command_that_installs_it(checks, monkeypatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "torch-mlir" else real(name))
    code, rows = checks()
    assert code == 0, "loading works without the compiler"
    assert not rows["torch-mlir"]["ok"]
    assert rows["torch-mlir"]["fix"] == "pip install 'fpcompiler[compiler]'"


def test_it_says_what_runs_layers_without_the_native_library(checks, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("FPC_NATIVE_LIBRARY", raising=False)
    monkeypatch.setenv("FPC_NATIVE", "0")
    code, rows = checks()
    assert code == 0
    assert rows["native library"]["found"] == "FPC_NATIVE=0 switches the native library off"
    assert rows["native library"]["fix"] == "unset FPC_NATIVE"
    if rows["oneDNN int8"]["ok"]:
        assert rows["oneDNN int8"]["found"] == "exact; in use here"
    monkeypatch.setenv("FPC_NATIVE", "require")
    monkeypatch.setattr(loading, "PATH", tmp_path / "libfpc.so")
    code, rows = checks()
    assert code == 0, "doctor tells what is missing; it does not fail for it"
    assert rows["native library"]["found"] == "the native library was not built"
    assert "install g++" in rows["native library"]["fix"]


@pytest.mark.parametrize("name", native.INSTRUCTION_SETS)
def test_it_says_which_kernels_ran_under_emulation_only(checks, monkeypatch, name) -> None:
    level = native.INSTRUCTION_SETS.index(name)
    monkeypatch.setattr(native, "why_missing", lambda: None)
    monkeypatch.setattr(native, "library", lambda: native.Library(ctypes.CDLL(None), level))
    code, rows = checks()
    assert code == 0
    emulated = ", run under emulation only so far" if name == "NEON dot product" else ""
    assert rows["native library"]["found"] == name + emulated


@pytest.mark.parametrize("version", ["", "2.10.1", "nightly"])
def test_an_unusable_torch_fails(checks, monkeypatch, version) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == "torch" else real(name))
    code, rows = checks()
    assert code == 1
    assert not rows["torch"]["ok"]


def test_a_package_that_does_not_import_is_not_ok() -> None:
    check = doctor._package("numpy", "numpy.no_such_module", "x", "y")
    assert not check.ok
    assert "does not import" in check.found


def test_tools_that_are_missing_or_broken(tmp_path) -> None:
    assert doctor._tool("t", None, ".*", "x", "y").found == "not found on PATH"
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    check = doctor._tool("nvcc", str(broken), ".*", "x", "y")
    assert not check.ok
    assert "does not run" in check.found
    broken.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    assert doctor._tool("nvcc", str(broken), r"release [\d.]+", "x", "y").found.startswith(
        "release 13.0"
    )


def test_nvcc_is_the_one_that_compiles_kernels(checks, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    row = checks()[1]["nvcc"]
    assert not row["ok"]
    assert row["found"].startswith(f"There is no nvcc in {tmp_path}")
    tool = tmp_path / "bin" / "nvcc"
    tool.parent.mkdir()
    for version, ok in (("11.8", False), ("13.0", True)):
        tool.write_text(f"#!/bin/sh\necho 'Cuda, release {version}, V{version}.88'\n")
        tool.chmod(0o755)
        row = checks()[1]["nvcc"]
        assert row["ok"] == ok
        assert version in row["found"]
    tool.write_text("no program")
    assert not checks()[1]["nvcc"]["ok"]


def test_what_compiles_and_checks_kernels_is_listed(checks, monkeypatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if "cutlass" in name:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(disassembly.shutil, "which", lambda name, path=None: None)
    rows = checks()[1]
    assert rows["nvidia-cutlass"]["fix"].endswith("nvidia-cutlass==4.2.0.0")
    assert rows["cuobjdump, nvdisasm"]["found"] == "there is no cuobjdump"
    assert "nvidia-cutlass-dsl is not installed" in rows["CuTe DSL"]["found"]
    names = ("nvcc", "nvidia-cutlass", "cuobjdump, nvdisasm", "CuTe DSL")
    assert not any(rows[name]["ok"] for name in names)


def test_the_table_names_the_fix_of_what_is_missing(capsys, monkeypatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "apt-get install g++" in text
