"""Writes packages of AOTInductor: the format ``aoti``."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch._inductor.package.package import package_aoti
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fpcompiler.artifact import Artifact
from fpcompiler.errors import ExportError, FpcompilerError, first_line
from fpcompiler.interop.aoti.library import Operators, operators
from fpcompiler.interop.aoti.program import native_module
from fpcompiler.interop.formats import Exported
from fpcompiler.interop.output import Sink, new_files
from fpcompiler.interop.program import Sizes, quiet, trace
from fpcompiler.interop.pt2 import PlanModule
from fpcompiler.native import INSTRUCTION_SETS, library
from fpcompiler.runtime.instructions import STEP_ERRORS
from fpcompiler.runtime.tables import VerifyRow
from fpcompiler.runtime.verify import GOLDEN_DB, judge, measure_noise, ratios
from fpcompiler.tree import are_leaves

__all__ = ["write"]

_ERRORS: Final = (*STEP_ERRORS, AssertionError)
"""What torch raises."""


def write(artifact: Artifact, path: Path) -> Exported:
    """Write an artifact as a package that ``torch._inductor.aoti_load_package`` reads.

    All that it needs beside torch is in it. It is for processors like this one. Before it takes
    its place it is loaded, and the recorded call run.

    Args:
        artifact: What to write; any target will do.
        path: The file.

    Raises:
        DependencyError: If there is no g++, or it does not compile the operators.
        OptionError: If the folder of builds cannot be written.
        ExportError: If the native library does not run a layer, torch cannot compile the program,
            or the package does not give what the artifact gives.
    """
    with new_files(path) as folder:  # Before the work: it says where a file cannot be written.
        # Not beside the file: torch does not quote paths, and that of a user may have spaces.
        with tempfile.TemporaryDirectory() as work, quiet():
            shims = operators(Path(work))
            module, sizes = native_module(artifact), Sizes(artifact.plan)
            program = trace(module, module.arguments(sizes.tensors), module.arguments(sizes.dims))
            _package(program, shims, Path(work), folder / path.name, {"scheme": artifact.scheme})
        checks = _replay(artifact, module, folder / path.name)
    return Exported((path,), _facts(module, checks))


def _package(
    program: ExportedProgram, shims: Operators, work: Path, file: Path, metadata: Mapping[str, str]
) -> None:
    """Compile a program and write the package; other files of that stay in the folder `work`."""
    options = {
        "aot_inductor.package": True,
        "aot_inductor.output_path": str(work / "model"),
        "aot_inductor.metadata": {f"fpcompiler.{key}": value for key, value in metadata.items()},
        "aot_inductor.custom_ops_to_c_shims": shims.declarations,
        "aot_inductor.custom_op_libs": shims.linked,
        # Or as many threads as this process has would be part of the code.
        "cpp.dynamic_threads": True,
    }
    args, kwargs = program.example_inputs or ((), {})
    try:
        files = torch._inductor.aot_compile(program.module(), args, kwargs, options=options)
    except _ERRORS as error:
        raise ExportError(
            f"AOTInductor of torch {torch.__version__} does not compile the program: "
            f"{_cause(error)}. Export to pt2, and report it with the artifact."
        ) from error
    assert isinstance(files, list)
    with file.open("wb", buffering=0) as raw:
        sink = Sink(raw)
        package_aoti(sink, [*files, *shims.files])  # type: ignore[arg-type]  # Any io object.
    if sink.error is not None:
        raise sink.error


def _cause(error: BaseException) -> str:
    """Return what a compiler said, if it was one, or else the first line."""
    said = [line.strip() for line in str(error).splitlines() if "error: " in line]
    return said[0] if said else first_line(error)


def _replay(artifact: Artifact, module: PlanModule, file: Path) -> list[VerifyRow]:
    """Return how recorded calls went, one after the other.

    Raises:
        ExportError: If the package cannot be loaded, or gives something else than was recorded.
    """
    leaves = are_leaves(artifact.plan.signature.outputs)
    found, bits = list[list[float]](), list[bool]()
    try:
        run = torch._inductor.aoti_load_package(str(file))
        for case in artifact.golden:
            # Constants of the result come as tensors here.
            values = pytree.tree_leaves(run(*module.arguments(case.inputs)))
            result = [value for value, is_leaf in zip(values, leaves, strict=True) if is_leaf]
            found.append(ratios(case.outputs, result))
            bits.append(all(map(torch.equal, case.outputs, result)))
    except (*_ERRORS, FpcompilerError) as error:
        raise ExportError(
            f"the package was made, but it does not run here: {first_line(error)}. Export to pt2, "
            "and report it with the artifact."
        ) from error
    explained = all(ratio >= GOLDEN_DB for call in found for ratio in call)
    noise = [math.inf] * len(found) if explained else measure_noise(artifact)
    rows = [
        judge(f"recorded call {index}", call, noise[index], bits[index])
        for index, call in enumerate(found)
    ]
    for row in rows:
        if row.result != "ok":
            raise ExportError(
                f"the package gives something else than the artifact, {row.check}: {row.detail}. "
                "Export to pt2, and report it with the artifact."
            )
    return rows


def _facts(module: PlanModule, checks: list[VerifyRow]) -> Mapping[str, Any]:
    native = library()
    assert native is not None
    said = "; ".join(f"{row.check}: {row.detail}" for row in checks)
    return {
        "arguments": ", ".join(parameter.name for parameter in module.taken),
        "load": "torch._inductor.aoti_load_package(path)",
        "processor": INSTRUCTION_SETS[native.instructions],
        "check": said or "no call was recorded, so that nothing was compared",
    }
