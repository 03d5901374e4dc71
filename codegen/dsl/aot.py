"""GEMMs for sm_100a compiled with CuTe DSL, ahead of time and without a GPU.

It has its own compiler down to PTX and machine code, and its own kernels, so that what it makes of
a problem is a second opinion. Its kernels have no scales, bias or residual behind the sums; the
product itself is that of CUTLASS's C++ templates.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fpcompiler.codegen.cutlass.instance import Instance
from fpcompiler.codegen.problem import BlockScale, OutputType
from fpcompiler.errors import DependencyError, TargetError
from fpcompiler.options import compiler_environment

__all__ = ["DslKernel", "build", "missing_packages", "why_not"]

_CHILD: Final = Path(__file__).with_name("child.py")
_PACKAGES: Final = {"nvidia-cutlass-dsl": "4.8.1", "nvidia-cutlass-operators": "0.3.0"}
"""The versions that are used: others may have other kernels, and other maps of tensors."""

_INSTALL: Final = "pip install 'fpcompiler[dsl]' gets what is compared with"
_SECONDS: Final = 300.0
_SMS: Final = 148  # of a B200; the grid is no larger
_OUTPUTS: Final = {
    OutputType.BF16: "BFloat16",
    OutputType.F16: "Float16",
    OutputType.F32: "Float32",
}


@dataclass(frozen=True)
class DslKernel:
    """What CuTe DSL made of an instance.

    Attributes:
        object: The object file, with host code and machine code.
        ptx: The PTX.
        import_seconds: CPU time of importing CuTe DSL.
        compile_seconds: CPU time of compiling.
    """

    object: Path
    ptx: str
    import_seconds: float
    compile_seconds: float


def why_not(instance: Instance) -> str:
    """Return why CuTe DSL does not compile an instance here; empty if it does."""
    if instance.arch != "sm_100a":
        return f"CuTe DSL's kernels are compared on sm_100a, not on {instance.arch}"
    if instance.scale is BlockScale.NONE:
        return "CuTe DSL has no kernel for these formats without block scales"
    missing = missing_packages()
    return f"{missing}; {_INSTALL}" if missing else ""


def missing_packages() -> str:
    """Return which packages are not there in the version that is used; empty if all are."""
    found = {name: _version(name) for name in _PACKAGES}
    wrong = [
        f"{name} {version or 'is not installed'}"
        for name, version in found.items()
        if version != _PACKAGES[name]
    ]
    return ", ".join(wrong)


def build(instance: Instance, folder: Path) -> DslKernel:
    """Compile the product of an instance; its epilogue is left out.

    Args:
        instance: The instance: formats, scales, tile, cluster and output type.
        folder: An empty folder for what comes out.

    Raises:
        DependencyError: If CuTe DSL is not installed, or has no kernel for it.
        TargetError: If it does not compile.
    """
    if reason := why_not(instance):
        raise DependencyError(f"{instance.name}: {reason}.")
    # In this process its settings and several hundred MB would stay.
    env = compiler_environment() | {
        "CUTE_DSL_ARCH": instance.arch,
        "CUTE_DSL_KEEP": "ptx",
        "CUTE_DSL_DUMP_DIR": str(folder),
    }
    command = [sys.executable, str(_CHILD), json.dumps(_request(instance, folder))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=folder, timeout=_SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TargetError(f"{instance.name}: CuTe DSL took over {_SECONDS:.0f} s.") from error
    texts = sorted(folder.glob("*.ptx"))
    if done.returncode or len(texts) != 1:
        raise TargetError(f"CuTe DSL did not compile {instance.name}:\n{done.stderr[-1500:]}")
    times = json.loads(done.stdout.splitlines()[-1])
    return DslKernel(folder / "k.o", texts[0].read_text(encoding="utf-8"), **times)


def _request(instance: Instance, folder: Path) -> dict[str, object]:
    return {
        "folder": str(folder),
        "a": _type(instance.a),
        "b": _type(instance.b),
        "scale": _type(instance.scale.value.partition(":")[2]),
        "block": instance.scale.block,
        "tile": [instance.tile.m, instance.tile.n],
        "cluster": list(instance.tile.cluster),
        "output": _OUTPUTS[instance.output],
        "sms": _SMS,
    }


def _type(format_name: str) -> str:
    """Return what CuTe DSL calls a format: ``f6E2M3FN`` is ``Float6E2M3FN``."""
    return f"Float{format_name.removeprefix('f')}"


def _version(package: str) -> str:
    # Not an import: CuTe DSL would stay in this process.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
