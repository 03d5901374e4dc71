"""``fpcompiler doctor``: what is installed here, what it is for, and how to get what is missing."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Final

from fpcompiler.cli.command import FAILED, OK, Command
from fpcompiler.cli.output import print_json, print_table
from fpcompiler.errors import DependencyError
from fpcompiler.options import Options

__all__ = ["COMMAND", "Check"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked for.

    Attributes:
        name: What.
        ok: Whether it is there and usable.
        found: Its version, or what is wrong.
        enables: What fpcompiler does with it.
        fix: The command or step that provides it.
        required: Whether nothing works without it.
    """

    name: str
    ok: bool
    found: str
    enables: str
    fix: str
    required: bool = False


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    checks = [_python(), _torch(), *_packages(), _native(), _onednn(), _compiler()]
    checks += [*_kernel_tools(), _gpu()]
    if args.json:
        print_json([asdict(check) for check in checks])
    else:
        rows = [
            (c.name, "ok" if c.ok else "missing", c.found, c.enables, "" if c.ok else c.fix)
            for c in checks
        ]
        print_table("this machine", ("what", "", "found", "what it is for", "how to get it"), rows)
    return OK if all(check.ok for check in checks if check.required) else FAILED


def _python() -> Check:
    return Check(
        "Python", sys.version_info >= (3, 11), platform.python_version(), "everything",
        "install Python 3.11 or newer", required=True,
    )  # fmt: skip


def _torch() -> Check:
    version = _version("torch")
    match = re.match(r"(\d+)\.(\d+)", version)
    new_enough = match is not None and (int(match[1]), int(match[2])) >= (2, 11)
    return Check(
        "torch", new_enough, version or "not installed", "everything",
        "pip install 'torch>=2.11'", required=True,
    )  # fmt: skip


def _packages() -> list[Check]:
    rows = (
        ("torch-mlir", "torch_mlir.ir", "compiling models; loading needs none of it",
         "pip install 'fpcompiler[compiler]'"),
        ("transformers", "transformers", "models from Hugging Face folders",
         "pip install 'fpcompiler[models]'"),
        ("onnxscript", "onnxscript", "exporting to ONNX", "pip install 'fpcompiler[onnx]'"),
        ("onnxruntime", "onnxruntime", "running what was exported to onnx-portable",
         "pip install 'fpcompiler[onnx]'"),
    )  # fmt: skip
    return [_package(*row) for row in rows]


def _package(name: str, module: str, enables: str, fix: str) -> Check:
    version = _version(name)
    if not version:
        return Check(name, False, "not installed", enables, fix)
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return Check(name, False, f"{version}, does not import: {error}", enables, fix)
    return Check(name, True, version, enables, fix)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _native() -> Check:
    from fpcompiler import native

    name, enables = "native library", "fast layers on the CPU, and fast quantization"
    off = Options.from_env().native is False
    fix = "unset FPC_NATIVE" if off else "install g++, then fpcompiler again"
    problem = native.why_missing()
    found = None if problem else native.library()
    if found is None:
        return Check(name, False, str(problem).partition(":")[0], enables, fix)
    instructions = native.INSTRUCTION_SETS[found.instructions]
    note = ", run under emulation only so far" if instructions in native.EMULATED else ""
    return Check(name, True, instructions + note, enables, fix)


def _onednn() -> Check:
    name = "oneDNN int8"
    enables, fix = (
        "int8 products without the native library (no scales of blocks; others: fp32, slower); "
        "one byte a weight",
        "use a PyTorch with oneDNN, on x86-64",
    )
    if importlib.util.find_spec("torch") is None:
        return Check(name, False, "torch is missing", enables, fix)
    from fpcompiler import native
    from fpcompiler.runtime.onednn import product_problem

    problem = product_problem()
    if problem:
        return Check(name, False, problem, enables, fix)
    used = "in use here" if native.why_missing() else "not needed here"
    return Check(name, True, f"exact; {used}", enables, fix)


def _compiler() -> Check:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return _tool(
        "C++ compiler", found, r"^.*$", "building the native library",
        "install g++, for instance: apt-get install g++",
    )  # fmt: skip


def _kernel_tools() -> list[Check]:
    """Look for what compiles and checks kernels, by the very functions that compile and check."""
    if importlib.util.find_spec("torch") is None:
        return []  # without it there is no code generator to ask
    return [_nvcc(), _cutlass(), _disassemblers(), _dsl()]


def _nvcc() -> Check:
    from fpcompiler.codegen.nvcc import find_nvcc

    name, enables = "nvcc", "compiling kernels for GPUs"
    fix = "install the CUDA toolkit 13, with its bin folder on PATH or in CUDA_HOME"
    try:
        found = find_nvcc(Options.from_env())
    except (DependencyError, OSError) as error:  # OSError: a file that is no program
        return Check(name, False, str(error).partition(". ")[0], enables, fix)
    return Check(name, True, f"{'.'.join(map(str, found.version))} ({found.path})", enables, fix)


def _cutlass() -> Check:
    from fpcompiler.codegen.cutlass.package import CUTLASS_VERSION, find_cutlass

    name = "nvidia-cutlass"
    enables = "kernels for Blackwell, and FP8 for Hopper; weights in four bits there need none"
    fix = f"pip install --no-deps nvidia-cutlass=={CUTLASS_VERSION}"
    try:
        found = find_cutlass()
    except DependencyError as error:
        return Check(name, False, _version(name) or str(error).partition(". ")[0], enables, fix)
    return Check(name, True, found.version, enables, fix)


def _disassemblers() -> Check:
    from fpcompiler.codegen.proof.disassembly import find_disassembler

    name, enables = "cuobjdump, nvdisasm", "level L3 of fpcompiler prove: machine code"
    fix = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    try:
        found = find_disassembler(Options.from_env())
    except DependencyError as error:
        return Check(name, False, str(error).partition(";")[0], enables, fix)
    return _tool(name, str(found.cuobjdump), r"release [\d.]+", enables, fix)


def _dsl() -> Check:
    from fpcompiler.codegen.dsl.aot import missing_packages

    missing = missing_packages()
    found = missing or _version("nvidia-cutlass-dsl")
    enables = "level L6 of fpcompiler prove: a second compiler; not under an open licence"
    return Check("CuTe DSL", not missing, found, enables, "pip install 'fpcompiler[dsl]'")


def _tool(name: str, path: str | None, pattern: str, enables: str, fix: str) -> Check:
    if path is None:
        return Check(name, False, "not found on PATH", enables, fix)
    try:
        result = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name, False, f"{path} does not run: {error}", enables, fix)
    match = re.search(pattern, result.stdout, re.MULTILINE)
    return Check(name, True, f"{match[0] if match else 'version unknown'} ({path})", enables, fix)


def _gpu() -> Check:
    enables, fix = "running models on CUDA", "use a machine with an NVIDIA GPU and a CUDA torch"
    if importlib.util.find_spec("torch") is None:
        return Check("GPU", False, "torch is missing", enables, fix)
    import torch

    if not torch.cuda.is_available():
        build = "a CPU build of torch" if torch.version.cuda is None else "torch sees no GPU"
        return Check("GPU", False, build, enables, fix)
    names = [
        "{} (sm_{}{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]
    return Check("GPU", True, ", ".join(names), enables, fix)


COMMAND: Final = Command(
    "doctor",
    "show what is installed, what it is for, and how to get what is missing",
    "  fpcompiler doctor",
    _add_arguments,
    _run,
)
