"""Writes ONNX files: the formats ``onnx-standard`` and ``onnx-portable``."""

from __future__ import annotations

import collections
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from fpcompiler.arguments import require_type
from fpcompiler.artifact import Artifact
from fpcompiler.errors import DependencyError, ExportError, OptionError
from fpcompiler.interop.formats import Exported
from fpcompiler.interop.output import new_files
from fpcompiler.runtime.onnx_model import GOLDEN_SUFFIX

if TYPE_CHECKING:
    import onnx_ir as ir

    from fpcompiler.interop.onnx.lower import Lowered

__all__ = ["HIGHEST_OPSET", "PACKAGES", "build", "require_packages", "write"]

HIGHEST_OPSET: Final = 28
"""The first opset with all types that are used: FLOAT6 came last."""

PACKAGES: Final = ("onnx", "onnxscript", "onnx_ir", "ml_dtypes")
"""What exporting needs: the extra ``onnx``."""

_LOWEST_OPSET: Final = 18
_DATA: Final = ".data"
"""Of the file beside it with constants."""

_INLINE_LIMIT: Final = 2_000_000_000
"""Bytes of constants that go into the file itself: protobuf ends at 2 GiB."""


def write(
    artifact: Artifact,
    path: Path,
    *,
    style: str,
    external_data: bool = False,
    opset: int = HIGHEST_OPSET,
) -> Exported:
    """Write an artifact as an ONNX file, which the checker of onnx has passed.

    A recorded call of the artifact goes into ``NAME.golden.safetensors`` beside it, so that whoever
    runs the file can see whether it gives the same.

    Args:
        artifact: What to write.
        path: The file.
        style: ``standard`` or ``portable``.
        external_data: Whether constants go into ``NAME.data`` beside it; above 2 GB they must.
        opset: The highest opset that may be used; the lowest one that does is written.

    Raises:
        DependencyError: If a package is missing.
        OptionError: If there is no such opset.
        ExportError: If ONNX cannot express the model; the message names the layer and what to do.
    """
    require_packages()
    require_type("opset", opset, (int,), "a number, such as 24")
    if not _LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise OptionError(f"opset={opset}: it is one from {_LOWEST_OPSET} to {HIGHEST_OPSET}.")
    with new_files(path) as folder:  # Before the work: it says where a file cannot be written.
        model, weights = build(artifact, style, opset)
        _fill(folder / path.name, artifact, model, style, weights, external_data)
        files = [path, *(path.parent / file.name for file in sorted(folder.iterdir()))]
    # Those of a file that was here before would be taken for data and calls of this one.
    for beside in (path.with_name(path.name + suffix) for suffix in (_DATA, GOLDEN_SUFFIX)):
        if beside not in files:
            beside.unlink(missing_ok=True)
    return Exported(tuple(dict.fromkeys(files)), _facts(model, weights))


def _fill(
    file: Path,
    artifact: Artifact,
    model: ir.Model,
    style: str,
    weights: Sequence[Lowered],
    external_data: bool,
) -> None:
    """Write a file and those beside it."""
    from fpcompiler.interop.onnx.metadata import describe, golden_file

    describe(model, artifact, style, weights)
    size = sum(tensor.nbytes for tensor in _constants(model))
    _save(model, file, external_data or size > _INLINE_LIMIT)
    golden_file(file, artifact)


def build(
    artifact: Artifact, style: str, highest: int = HIGHEST_OPSET
) -> tuple[ir.Model, list[Lowered]]:
    """Return an artifact as an ONNX model in memory, and its quantized weights.

    Raises:
        DependencyError: If a package is missing.
        ExportError: If ONNX cannot express the model.
    """
    require_packages()
    from fpcompiler.interop.onnx.lower import lower
    from fpcompiler.interop.onnx.opsets import needed_opset, set_opset
    from fpcompiler.interop.onnx.portable import Portable
    from fpcompiler.interop.onnx.standard import Standard
    from fpcompiler.interop.onnx.trace import trace_onnx

    model = trace_onnx(artifact)
    weights = lower(model, Standard(highest) if style == "standard" else Portable())
    set_opset(model, needed_opset(model))
    return model, weights


def require_packages() -> None:
    """Raise if a package is missing.

    Raises:
        DependencyError: With the command that installs what is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"ONNX files need {', '.join(missing)}: pip install 'fpcompiler[onnx]'."
        )
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DependencyError(
                f"{name}, which exporting to ONNX needs, is installed, but importing it fails: "
                f"{error}. Install it again: pip install --force-reinstall {name}."
            ) from error


def _constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            yield value.const_value


def _save(model: ir.Model, path: Path, external: bool) -> None:
    """Write a file, and let the checker of onnx read it."""
    import onnx
    import onnx_ir

    onnx_ir.save(model, path, external_data=path.name + _DATA if external else None)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"onnx {onnx.__version__} refuses the file that was made of this model: {error}. "
            "Export to pt2, and report it with the artifact."
        ) from error


def _facts(model: ir.Model, weights: Sequence[Lowered]) -> Mapping[str, Any]:
    constants = model.graph.initializers
    kinds = collections.Counter(str(constants[weight.codes].dtype) for weight in weights)
    return MappingProxyType(
        {
            "opset": model.graph.opset_imports[""],
            "ir_version": model.ir_version,
            "operations": len(model.graph),
            "quantized_weights": dict(kinds),
            "inputs": ", ".join(value.name or "" for value in model.graph.inputs),
        }
    )
