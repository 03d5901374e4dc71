"""The library of operators that run compiled kernels: built with g++, once, and without a GPU.

It does not depend on a target, and a build serves every torch from 2.10 on, so that it travels in
artifacts beside the kernels. Builds are in ``<cache>/kernels/<key>/``, as those of nvcc are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any, Final

import torch

from fpcompiler.codegen.slots import locked
from fpcompiler.errors import DependencyError, OptionError
from fpcompiler.options import Options, compiler_environment

__all__ = ["build_operators", "operators_source", "OPERATORS"]

OPERATORS: Final = "operators"
"""The role of the library among the kernels of an artifact, and its name there."""

_TORCH: Final = "0x020a000000000000"
"""The oldest torch whose interface is used: 2.10."""

_FLAGS: Final = (
    "-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-DNDEBUG",
    f"-DTORCH_TARGET_VERSION={_TORCH}", "-frandom-seed=fpc", "-Wl,--strip-all",
    "-Wl,--build-id=none",
)  # fmt: skip
_PARTS: Final = (
    ("fpcompiler.codegen.cuda", "arguments.h"),
    ("fpcompiler.codegen.attention", "attention.h"),
    ("fpcompiler.codegen.cutlass", "templates/kernel_abi.h"),
    ("fpcompiler.runtime.cuda", "operators.cpp"),
)


def operators_source() -> str:
    """Return the source, with the interfaces of the kernels in it."""
    texts = [resources.files(package).joinpath(name).read_text("utf-8") for package, name in _PARTS]
    own = [line for line in texts[-1].splitlines() if not line.startswith('#include "')]
    headers = [text.replace("#pragma once\n", "") for text in texts[:-1]]
    return "\n".join([*headers, *own, ""])


def build_operators(options: Options | None = None) -> Path:
    """Return the library, compiled if it is not there.

    Args:
        options: Where compiled kernels are; by default as the environment says.

    Raises:
        DependencyError: If there is no g++, or it does not compile the source.
        OptionError: If the folder of compiled kernels cannot be written.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise DependencyError(
            "There is no g++, so the operators that run kernels cannot be built. Install it "
            "(apt-get install g++)."
        )
    toolchain = f"{_version_of(compiler)}, torch {torch.__version__}"
    source = operators_source()
    key = hashlib.sha256("\0".join([source, toolchain, *_FLAGS]).encode()).hexdigest()[:32]
    cache = (options or Options.from_env()).cache
    final = cache / "kernels" / key
    try:
        with locked(cache / "locks" / key):
            if not _is_intact(final):
                _compile(compiler, source, toolchain, final)
    except OSError as error:
        raise OptionError(
            f"the operators cannot be kept in {cache}: {error.strerror}. Point FPC_CACHE to a "
            "folder that can be written."
        ) from error
    return final / "kernel.so"


def _compile(compiler: str, source: str, toolchain: str, final: Path) -> None:
    final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=final.parent) as folder:
        work = Path(folder) / "work"
        work.mkdir()
        (work / "operators.cpp").write_text(source, encoding="utf-8")
        # torch's own headers are not ours to warn about; its library is loaded already.
        command = [
            compiler, *_FLAGS, "-isystem", str(root / "include"), "operators.cpp",
            f"-L{root / 'lib'}", "-ltorch_cpu", "-o", "kernel.so",
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=work, capture_output=True, text=True, check=False,
            env=compiler_environment(),
        )  # fmt: skip
        if done.returncode:
            raise DependencyError(
                f"g++ does not compile the operators that run kernels with the headers of torch "
                f"{torch.__version__}:\n{done.stderr[:2000]}"
            )
        metadata = _metadata(work / "kernel.so", toolchain)
        (work / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        if final.exists():  # damaged; its lock is ours
            shutil.rmtree(final)
        os.rename(work, final)


def _metadata(library: Path, toolchain: str) -> dict[str, Any]:
    return {
        "name": OPERATORS,
        "sha256": _sha256(library),
        "toolchain": toolchain,
        "flags": list(_FLAGS),
    }


def _is_intact(folder: Path) -> bool:
    try:
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        return bool(metadata["sha256"] == _sha256(folder / "kernel.so"))
    except (OSError, ValueError, KeyError, TypeError):
        return False  # not there, or damaged


def _version_of(compiler: str) -> str:
    run = subprocess.run(
        [compiler, "-dumpfullversion"], capture_output=True, text=True, check=False
    )
    return f"g++ {run.stdout.strip()}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
