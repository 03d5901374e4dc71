"""Machine code and PTX of a compiled kernel, as NVIDIA's disassemblers print them.

They come with the CUDA toolkit, or as the packages ``nvidia-cuda-cuobjdump`` and
``nvidia-cuda-nvdisasm``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from fpcompiler.errors import DependencyError, TargetError
from fpcompiler.options import Options, compiler_environment

__all__ = ["Disassembler", "MachineCode", "find_disassembler", "parse_machine_code"]

_TOOLKIT: Final = Path("/usr/local/cuda/bin")
_INSTALL: Final = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"

_ARCH: Final = re.compile(r"^arch = (\w+)", re.MULTILINE)
_FUNCTION: Final = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
# The offset, perhaps a predicate, the name with its modifiers.
_INSTRUCTION: Final = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE
)
_USAGE: Final = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class MachineCode:
    """One GPU function.

    Attributes:
        arch: The architecture, such as ``sm_100a``.
        opcodes: How many instructions there are of each name, with its modifiers.
        registers: Registers of a thread.
        stack: Bytes of its stack.
        local: Bytes of its local memory.
        shared: Bytes of shared memory that do not depend on the launch.
    """

    arch: str
    opcodes: Mapping[str, int] = field(hash=False)
    registers: int
    stack: int
    local: int
    shared: int

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, the most frequent instruction first."""
        ordered = sorted(self.opcodes.items(), key=lambda item: (-item[1], item[0]))
        return {**vars(self), "opcodes": dict(ordered)}


@dataclass(frozen=True)
class Disassembler:
    """NVIDIA's disassemblers.

    Attributes:
        cuobjdump: The program that finds device code in a library.
        nvdisasm: The program that it calls for machine code.
    """

    cuobjdump: Path
    nvdisasm: Path

    def machine_code(self, library: Path) -> MachineCode:
        """Return the machine code of a library with one GPU function.

        Raises:
            TargetError: If there is no such function, or several.
        """
        return parse_machine_code(self._run("-sass", library), self._run("-res-usage", library))

    def ptx(self, library: Path) -> str:
        """Return the PTX in a library; empty if there is none."""
        _, _, text = self._run("-ptx", library).partition(".version")
        return f".version{text}" if text else ""

    def _run(self, option: str, library: Path) -> str:
        env = compiler_environment()
        # cuobjdump looks for nvdisasm there only.
        env["PATH"] = os.pathsep.join((str(self.nvdisasm.parent), env.get("PATH", "")))
        done = subprocess.run(
            [str(self.cuobjdump), option, str(library)],
            capture_output=True, text=True, env=env, check=False,
        )  # fmt: skip
        if done.returncode:
            raise TargetError(f"cuobjdump {option} {library}: {done.stderr.strip()[-300:]}")
        return done.stdout


def find_disassembler(options: Options) -> Disassembler:
    """Return the disassemblers of ``CUDA_HOME``, of ``PATH``, of the toolkit, or of the packages.

    Raises:
        DependencyError: If one of the two is nowhere.
    """
    home = [options.cuda_home / "bin"] if options.cuda_home else []
    folders = [*map(str, home), None, str(_TOOLKIT), *map(str, _package_folders())]
    found = []
    for name in ("cuobjdump", "nvdisasm"):
        paths = (shutil.which(name, path=folder) for folder in folders)
        path = next((Path(path) for path in paths if path), None)
        if path is None:
            raise DependencyError(f"there is no {name}; {_INSTALL}")
        found.append(path)
    return Disassembler(*found)


def parse_machine_code(sass: str, usage: str) -> MachineCode:
    """Return the one function in what ``cuobjdump`` prints with ``-sass`` and ``-res-usage``.

    Raises:
        TargetError: If there is none, or several.
    """
    functions, rows = list(_FUNCTION.finditer(sass)), _USAGE.findall(usage)
    if len(functions) != 1 or len(rows) != 1:
        raise TargetError(f"there are {len(functions)} GPU functions, not one")
    start = functions[0].start()
    arch = [match[1] for match in _ARCH.finditer(sass) if match.start() < start][-1]
    _, registers, stack, shared, local = rows[0]
    opcodes = Counter(_INSTRUCTION.findall(sass, start))
    return MachineCode(
        arch, MappingProxyType(dict(opcodes)), int(registers), int(stack), int(local), int(shared)
    )


def _package_folders() -> list[Path]:
    found = importlib.util.find_spec("nvidia")  # a namespace of several packages
    places = found.submodule_search_locations if found else None
    return [folder for place in places or () for folder in sorted(Path(place).glob("cu*/bin"))]
