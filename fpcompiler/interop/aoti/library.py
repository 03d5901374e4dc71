"""The libraries that are in a package: the operators of its model, and the native library.

Both have names made of what is in them. A process that loads several packages has each once, and
packages of different versions have nothing in common.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

import torch

from fpcompiler.codegen.host_library import FLAGS, HostLibrary
from fpcompiler.errors import ExportError
from fpcompiler.native import library, why_missing
from fpcompiler.options import Options

__all__ = ["Operators", "SHIMS", "operators"]

_TENSOR: Final = "AtenTensorHandle"
_LAYER: Final = f"{_TENSOR}, int64_t, const char*, const char*, {_TENSOR}*"
"""What the library is told of a layer, and the result."""

SHIMS: Final = {
    "native_prepare": f"{_TENSOR}, {_LAYER}",
    "native_prepare_produced": (
        f"{_TENSOR}, {_TENSOR}*, {_TENSOR}*, {_TENSOR}*, {_TENSOR}*, const char*, double, {_LAYER}"
    ),
    "native_multiply": (
        f"{_TENSOR}, {_TENSOR}, {_TENSOR}, {_TENSOR}, {_TENSOR}*, int64_t, int32_t, const char*, "
        f"{_TENSOR}*, {_TENSOR}*"
    ),
}
"""The parameters of the C functions in operators.cpp, by the names of the operators in ``fpc``."""


@dataclass(frozen=True)
class Operators:
    """The libraries, in a folder.

    Attributes:
        folder: Where they are.
        names: Theirs. They do not end with ``.so``, by which torch would take one for the model.
    """

    folder: Path
    names: tuple[str, str]

    @property
    def files(self) -> list[str]:
        """The paths of both."""
        return [str(self.folder / name) for name in self.names]

    @property
    def declarations(self) -> dict[torch._ops.OpOverload, list[str]]:
        """The C functions, as ``aot_inductor.custom_ops_to_c_shims`` takes them."""
        return {
            getattr(torch.ops.fpc, name).default: [
                f"AOTITorchError aoti_torch_cpu_{name}({parameters})"
            ]
            for name, parameters in SHIMS.items()
        }

    @property
    def linked(self) -> list[str]:
        """What the model is linked with, as ``aot_inductor.custom_op_libs`` takes it.

        Torch writes ``-l`` in front. There is no option for the folder, nor for what says that a
        model finds the libraries beside it, so they stand behind the name.
        """
        return [f":{self.names[0]} {shlex.quote(f'-L{self.folder}')} '-Wl,-rpath,$ORIGIN'"]


def operators(folder: Path, options: Options | None = None) -> Operators:
    """Return the libraries in a folder, built if this is the first time.

    Args:
        folder: Where they are copied to.
        options: Where builds are; by default as the environment says.

    Raises:
        DependencyError: If there is no g++, or it does not compile the operators.
        OptionError: If the folder of builds cannot be written.
        ExportError: If there is no native library.
    """
    native = library()
    if native is None:
        raise ExportError(
            f"a package of AOTInductor runs native kernels, and {why_missing()}. Export to pt2, "
            "which runs without them."
        )
    source = "\n".join(_read(*part) for part in _PARTS)
    mark = hashlib.sha256(native.path.read_bytes()).hexdigest()[:12]
    beside = f"libfpc-{mark}.so.1"
    own = hashlib.sha256(f"{source}{mark}{torch.__version__}".encode()).hexdigest()[:12]
    name = f"libfpc_operators-{own}.so.1"
    flags = (*FLAGS, "-Wl,-rpath,$ORIGIN", f"-Wl,-soname,{name}")
    build = HostLibrary(
        "aoti", "packages of AOTInductor call", source, flags, {beside: native.path}
    )
    path = build.build(options)
    shutil.copyfile(path, folder / name)
    shutil.copyfile(path.with_name(beside), folder / beside)
    return Operators(folder, (name, beside))


_PARTS: Final = (
    ("fpcompiler.native", "csrc/native.h"),
    ("fpcompiler.interop.aoti", "operators.cpp"),
)


def _read(package: str, name: str) -> str:
    text = resources.files(package).joinpath(name).read_text("utf-8")
    return "\n".join(line for line in text.splitlines() if not line.startswith('#include "'))
