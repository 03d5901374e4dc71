"""Libraries of operators for torch: built with g++, each once.

They use the stable C interface of torch alone, so that a build serves every torch from 2.10 on.
Builds are in ``<cache>/kernels/<key>/``, as those of nvcc are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from fpcompiler.codegen.slots import locked
from fpcompiler.errors import DependencyError, OptionError
from fpcompiler.options import Options, compiler_environment

__all__ = ["HostLibrary", "FLAGS"]

_TORCH: Final = "0x020a000000000000"
"""The oldest torch whose interface is used: 2.10."""

FLAGS: Final = (
    "-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-DNDEBUG",
    f"-DTORCH_TARGET_VERSION={_TORCH}", "-frandom-seed=fpc", "-Wl,--strip-all",
    "-Wl,--build-id=none",
)  # fmt: skip


@dataclass(frozen=True)
class HostLibrary:
    """A library that is built when it is needed.

    Attributes:
        name: Of the operators, for the metadata of the build.
        purpose: What they do, for errors: "run kernels".
        source: The whole source, but for headers of torch.
        flags: How it is compiled.
        beside: Libraries that it is linked with, by the names of their copies beside it.
    """

    name: str
    purpose: str
    source: str
    flags: Sequence[str] = FLAGS
    beside: Mapping[str, Path] = field(default_factory=dict)

    def build(self, options: Options | None = None) -> Path:
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
                f"There is no g++, so the operators that {self.purpose} cannot be built. Install "
                "it (apt-get install g++)."
            )
        toolchain = f"{_version_of(compiler)}, torch {torch.__version__}"
        linked = [f"{name} {_sha256(path)}" for name, path in self.beside.items()]
        text = "\0".join([self.source, toolchain, *self.flags, *linked])
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        cache = (options or Options.from_env()).cache
        final = cache / "kernels" / key
        try:
            with locked(cache / "locks" / key):
                if not _is_intact(final):
                    self._compile(compiler, toolchain, final)
        except OSError as error:
            raise OptionError(
                f"the operators cannot be kept in {cache}: {error.strerror}. Point FPC_CACHE to a "
                "folder that can be written."
            ) from error
        return final / "kernel.so"

    def _compile(self, compiler: str, toolchain: str, final: Path) -> None:
        final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        root = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=final.parent) as folder:
            work = Path(folder) / "work"
            work.mkdir()
            (work / "operators.cpp").write_text(self.source, encoding="utf-8")
            for name, path in self.beside.items():
                shutil.copyfile(path, work / name)
            # torch's own headers are not ours to warn about; its library is loaded already.
            command = [
                compiler, *self.flags, "-isystem", str(root / "include"), "operators.cpp",
                *self.beside, f"-L{root / 'lib'}", "-ltorch_cpu", "-o", "kernel.so",
            ]  # fmt: skip
            done = subprocess.run(
                command, cwd=work, capture_output=True, text=True, check=False,
                env=compiler_environment(),
            )  # fmt: skip
            if done.returncode:
                raise DependencyError(
                    f"g++ does not compile the operators that {self.purpose} with the headers of "
                    f"torch {torch.__version__}:\n{done.stderr[:2000]}"
                )
            metadata = json.dumps(self._metadata(work / "kernel.so", toolchain), indent=1)
            (work / "metadata.json").write_text(metadata + "\n", encoding="utf-8")
            if final.exists():  # damaged; its lock is ours
                shutil.rmtree(final)
            os.rename(work, final)

    def _metadata(self, library: Path, toolchain: str) -> dict[str, Any]:
        return {
            "name": self.name,
            "sha256": _sha256(library),
            "toolchain": toolchain,
            "flags": list(self.flags),
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
