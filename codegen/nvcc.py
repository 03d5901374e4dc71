"""The CUDA compiler: finding it, its flags, and one run of it."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fpcompiler.codegen.arch import ARCHS
from fpcompiler.codegen.kernel import KernelSource
from fpcompiler.errors import DependencyError, TargetError
from fpcompiler.options import Options, compiler_environment

__all__ = ["Nvcc", "Cost", "find_nvcc", "MINIMUM_NVCC"]

MINIMUM_NVCC: Final = (12, 8)
"""The first version that compiles for Blackwell."""

_FALLBACK: Final = Path("/usr/local/cuda")

_FLAGS: Final = (
    "-std=c++17", "-O3", "-DNDEBUG", "-w", "--expt-relaxed-constexpr", "--resource-usage",
    "-Xcompiler", "-fPIC,-fvisibility=hidden",
)  # fmt: skip
# A quarter of the size is names that nobody looks up.
_LINK_FLAGS: Final = ("-shared", "-Xlinker", "--strip-all")


@dataclass(frozen=True)
class Cost:
    """What a run of the compiler took.

    Attributes:
        seconds: CPU time in user mode, of all its processes.
        peak_mb: Memory of its largest process.
    """

    seconds: float
    peak_mb: int


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that was found.

    Attributes:
        path: The program.
        version: Its version, such as (13, 0).
        toolchain: It and the C++ compiler that it calls, with their versions in full.
    """

    path: Path
    version: tuple[int, int]
    toolchain: str

    def compile_flags(self, arch: str) -> tuple[str, ...]:
        """Return the flags that make an object file, all but folders and files.

        The PTX goes into the library beside the machine code: it shows which formats an
        instruction reads, where the machine code's text does not.

        Raises:
            TargetError: If this nvcc does not know the architecture.
        """
        machine = ARCHS[arch]
        if self.version < machine.nvcc:
            need, have = (".".join(map(str, v)) for v in (machine.nvcc, self.version))
            raise TargetError(
                f"{arch} needs nvcc {need} or newer; {self.path} is {have}. Point CUDA_HOME to a "
                "newer toolkit, or choose another architecture."
            )
        suffix = machine.suffix
        code = f"-gencode=arch=compute_{suffix},code=[sm_{suffix},compute_{suffix}]"
        return (*_FLAGS, code)

    def flags(self, arch: str) -> tuple[str, ...]:
        """Return all flags that make a library, for its key.

        Raises:
            TargetError: If this nvcc does not know the architecture.
        """
        return (*self.compile_flags(arch), *_LINK_FLAGS)

    def compile(self, source: KernelSource, folder: Path) -> Cost | None:
        """Compile ``kernel.cu`` of a folder to ``kernel.o``; return None if that failed.

        What the compiler prints goes to the end of ``build.log``.
        """
        include = [f"-I{path}" for path in source.include]
        flags = self.compile_flags(source.arch)
        return self._run([*flags, *include, "-c", "kernel.cu", "-o", "kernel.o"], folder)

    def link(self, folder: Path, runtime: str = "static", name: str = "kernel.so") -> Cost | None:
        """Link ``kernel.o`` of a folder to a shared library; return None if that failed.

        Args:
            folder: The folder.
            runtime: ``static`` for a library that needs no other, ``shared`` for one that uses the
                libcudart of its process.
            name: What the library is called.
        """
        return self._run([*_LINK_FLAGS, "-cudart", runtime, "kernel.o", "-o", name], folder)

    def _run(self, arguments: Sequence[str], folder: Path) -> Cost | None:
        command = [str(self.path), *arguments]
        with (folder / "build.log").open("a", encoding="utf-8") as stream:
            stream.write(" ".join(command) + "\n")
            stream.flush()
            process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=compiler_environment(), cwd=folder,
            )  # fmt: skip
            # Not wait(): only wait4 tells what this one child and its own children took.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        return _cost(usage) if process.returncode == 0 else None


def find_nvcc(options: Options) -> Nvcc:
    """Return the nvcc of ``CUDA_HOME``, else the first on ``PATH``, else that of the usual folder.

    Raises:
        DependencyError: If there is none, or it is too old for Blackwell.
    """
    path = _find(options.cuda_home)
    if path is None:
        where = options.cuda_home or f"PATH and {_FALLBACK}"
        raise DependencyError(
            f"There is no nvcc in {where}, so kernels cannot be compiled. Install the CUDA toolkit "
            f"{'.'.join(map(str, MINIMUM_NVCC))} or newer, or point CUDA_HOME to it. No GPU and no "
            "driver are needed."
        )
    text = _output([str(path), "--version"])
    found = re.search(r"release (\d+)\.(\d+), (V\S+)", text)
    if found is None:
        raise DependencyError(f"{path} is no nvcc: --version printed {text.strip()[:200]!r}.")
    version = int(found[1]), int(found[2])
    if version < MINIMUM_NVCC:
        raise DependencyError(
            f"{path} is nvcc {found[1]}.{found[2]}; FP4 needs {'.'.join(map(str, MINIMUM_NVCC))} "
            "or newer. Point CUDA_HOME to a newer toolkit."
        )
    return Nvcc(path, version, f"nvcc {found[3]}, {_host_compiler()}")


def _find(home: Path | None) -> Path | None:
    places = [str(home / "bin")] if home else [None, str(_FALLBACK / "bin")]
    found = (shutil.which("nvcc", path=place) for place in places)
    return next((Path(path) for path in found if path), None)


def _host_compiler() -> str:
    path = shutil.which("g++")
    return f"g++ {_output([path, '-dumpfullversion']).strip()}" if path else "no g++"


def _output(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout + run.stderr


def _cost(usage: resource.struct_rusage) -> Cost:
    # ru_maxrss is in KB on Linux, of the largest process among the child and its descendants.
    return Cost(round(usage.ru_utime, 1), usage.ru_maxrss // 1024)
