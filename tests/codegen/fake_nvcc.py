"""A folder like a CUDA toolkit's, with a program in place of nvcc."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fpcompiler.codegen.kernel import KernelSource
from fpcompiler.codegen.nvcc import Nvcc, find_nvcc
from fpcompiler.options import Options

_SCRIPT: Final = """#!/bin/sh
here=$(dirname "$0")
if [ "$1" = --version ]; then
    echo "Cuda compilation tools, release VERSION, VVERSION.88"
    exit 0
fi
for word; do
    [ "$last" = -o ] && out=$word
    [ "$last" = -c ] && in=$word
    case $last in static | shared) in=$word ;; esac
    last=$word
done
echo "$out" >> "$here/runs"
if grep -q "broken" "$in"; then
    echo "some warning"
    echo "kernel.cu(3): error: identifier \\"broken\\" is undefined"
    exit 2
fi
cat "$in" > "$out"
case $out in *.so) exit 0 ;; esac
mkdir "$here/running.$$"
ls -d "$here"/running.* | wc -l >> "$here/at-once"
sleep DELAY
echo "ptxas info    : Compiling entry function 'main_kernel' for 'sm_100a'"
echo "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads"
echo "ptxas info    : Used 136 registers, used 7 barriers"
rmdir "$here/running.$$"
"""


def fake_toolkit(folder: Path, version: str = "13.0", delay: float = 0) -> Path:
    """Write a toolkit whose nvcc copies its input, and fails where that says ``broken``.

    Args:
        folder: A folder, as for ``CUDA_HOME``.
        version: What its nvcc says that it is.
        delay: Seconds that it takes.
    """
    program = folder / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    text = _SCRIPT.replace("VERSION", version).replace("DELAY", str(delay))
    program.write_text(text, encoding="utf-8")
    program.chmod(0o755)
    return folder


def fake_nvcc(folder: Path, version: str = "13.0", delay: float = 0) -> Nvcc:
    """Return the nvcc of :func:`fake_toolkit`."""
    return find_nvcc(Options(cuda_home=fake_toolkit(folder, version, delay)))


def compilations(folder: Path) -> int:
    """Return how many sources were compiled, or tried."""
    runs = folder / "bin" / "runs"
    lines = runs.read_text(encoding="utf-8").splitlines() if runs.exists() else []
    return sum(line.endswith(".o") for line in lines)


def most_at_once(folder: Path) -> int:
    """Return how many compilers ran at once."""
    lines = (folder / "bin" / "at-once").read_text(encoding="utf-8").split()
    return max(map(int, lines))


def source(text: str = "int main;", arch: str = "sm_100a") -> KernelSource:
    """Return a source."""
    return KernelSource("gemm_test", text, arch, headers="none", description={"n": 1})
