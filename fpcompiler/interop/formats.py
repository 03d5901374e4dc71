"""The formats that a compiled model can be exported to: a row each, whose writer is loaded late."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol

from fpcompiler.arguments import PATH, require_type
from fpcompiler.errors import OptionError

if TYPE_CHECKING:
    from fpcompiler.artifact import Artifact

__all__ = ["EXPORT_FORMATS", "ExportFormat", "Exported", "Writer", "export"]


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        files: The files, the one to open first.
        facts: What there is to know of them, for people and as JSON values.
    """

    files: tuple[Path, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Writer(Protocol):
    """Writes an artifact in a format."""

    def __call__(self, artifact: Artifact, path: Path, **options: Any) -> Exported:
        """Write the artifact.

        Args:
            artifact: What to write.
            path: The file, or the folder.
            options: Those of :attr:`ExportFormat.options` that were given.
        """


@dataclass(frozen=True)
class ExportFormat:
    """A format.

    Attributes:
        name: What the user writes.
        summary: What it is for, in a line.
        module: The module whose function ``write`` is a :class:`Writer`.
        suffix: What the name of the file ends with; empty where a folder is written.
        options: Names of the options that the writer takes.
        fixed: Arguments that make it this format, where a writer has several.
    """

    name: str
    summary: str
    module: str
    suffix: str
    options: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def write(self, artifact: Artifact, path: Path, **options: Any) -> Exported:
        """Write an artifact in this format; see :func:`export`."""
        writer: Writer = importlib.import_module(self.module).write
        return writer(artifact, path, **self.fixed, **options)


_ONNX: Final = "fpcompiler.interop.onnx.write"

_ROWS: Final = (
    ExportFormat(
        "onnx-standard",
        "ONNX with FLOAT4E2M1, FLOAT6 and FLOAT8 weights, QuantizeLinear and DequantizeLinear",
        _ONNX,
        ".onnx",
        ("external_data", "opset"),
        {"style": "standard"},
    ),
    ExportFormat(
        "onnx-portable",
        "ONNX that onnxruntime runs on any CPU: uint8 codes, look-up tables, elementary operations",
        _ONNX,
        ".onnx",
        ("external_data", "opset"),
        {"style": "portable"},
    ),
    ExportFormat(
        "pt2",
        "an archive of torch.export with the operators fpc::, for torch with fpcompiler.runtime",
        "fpcompiler.interop.pt2",
        ".pt2",
    ),
    ExportFormat(
        "aoti",
        "a package of AOTInductor with native kernels, for C++ and Python without fpcompiler",
        "fpcompiler.interop.aoti.write",
        ".pt2",
    ),
    ExportFormat(
        "compressed-tensors",
        "a folder of NVFP4 or MX weights for transformers, vLLM and SGLang",
        "fpcompiler.interop.checkpoints.compressed",
        "",
        ("model",),
    ),
)

EXPORT_FORMATS: Final[Mapping[str, ExportFormat]] = MappingProxyType(
    {row.name: row for row in _ROWS}
)
"""Every format by name."""

_FILES: Final = frozenset(
    {".bin", ".fpc", ".gguf", ".json", ".safetensors", ".txt", *(row.suffix for row in _ROWS)}
) - {""}
"""What no name of a folder ends with: its files would be looked for under that of a file."""


def export(
    artifact: Artifact, path: str | os.PathLike[str], format: str, **options: Any
) -> Exported:
    """Write a compiled model in the format of another tool.

    Args:
        artifact: What to write.
        path: The file, or the folder where the format is one.
        format: A name in :data:`EXPORT_FORMATS`.
        options: Options of the format; None stands for one that is left out.

    Raises:
        OptionError: If there is no such format or option, or the name of the file is that of
            another kind of file.
        DependencyError: If a package is missing that the format needs.
        ExportError: If the format cannot express the model; the message names the layer.
    """
    require_type("the path", path, PATH, "that of a file or folder")
    row = EXPORT_FORMATS.get(format)
    if row is None:
        near = difflib.get_close_matches(str(format), [*EXPORT_FORMATS], n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise OptionError(
            f"there is no export format {format!r}. {hint}Formats: {', '.join(EXPORT_FORMATS)}."
        )
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in row.options:
            takes = f"it takes {', '.join(row.options)}" if row.options else "it takes none"
            raise OptionError(f"{format} has no option {name!r}; {takes}.")
    _require_suffix(row, Path(path))
    return row.write(artifact, Path(path), **given)


def _require_suffix(row: ExportFormat, path: Path) -> None:
    if row.suffix and path.suffix != row.suffix and not path.is_dir():  # A writer refuses that.
        raise OptionError(
            f"{path} does not end with {row.suffix}, as files of {row.name} do. Write "
            f"{path.stem or 'model'}{row.suffix}."
        )
    if not row.suffix and path.suffix in _FILES:
        raise OptionError(
            f"{row.name} is written as a folder, and {path} has the name of a {path.suffix} file. "
            f"Write {path.stem}."
        )
