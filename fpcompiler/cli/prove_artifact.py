"""The kernels of an artifact, for ``fpcompiler prove``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fpcompiler.cli.output import progress
from fpcompiler.errors import ArtifactError, TargetError

if TYPE_CHECKING:
    from fpcompiler.artifact import Artifact
    from fpcompiler.artifact.kernels import Instance
    from fpcompiler.codegen.kernel import BuiltKernel

__all__ = ["WHY_NOT_PACKED", "proved", "recorded"]

WHY_NOT_PACKED: Final = (
    "the levels of proof are for kernels that CUTLASS generates. Those whose weights stay in four "
    "bits are fpcompiler's own, and are tested on a Hopper GPU (H100, H200) alone:"
)
"""Why such kernels are not proved; what tests them follows."""


def recorded(file: str, target: str | None) -> list[dict[str, Any]]:
    """Return what an artifact says was checked when it was compiled.

    Args:
        file: The artifact.
        target: One of its GPUs; None for all.

    Raises:
        ArtifactError: If it has no kernels or no records, or those are of other libraries.
        TargetError: If it has no kernels for the target, or none that is proved.
    """
    artifact = _read(file)
    return [_recorded(instance, artifact.kernels) for instance in _gemms(artifact, file, target)]


def proved(file: str, target: str | None) -> list[dict[str, Any]]:
    """Check the kernels of an artifact here; those that were not compiled here are compiled again.

    Args:
        file: The artifact.
        target: One of its GPUs; None for all.

    Returns:
        The records; ``of_the_file`` says whether a kernel has the bytes of the file.

    Raises:
        ArtifactError: If it has no kernels.
        TargetError: If it has no kernels for the target, or none that is proved, or one does not
            compile.
        DependencyError: If there is no nvcc, or CUTLASS is not installed.
    """
    return [_proved(instance) for instance in _gemms(_read(file), file, target)]


def _read(file: str) -> Artifact:
    from fpcompiler import artifact

    return artifact.read(file)


def _gemms(artifact: Artifact, file: str, target: str | None) -> list[Instance]:
    from fpcompiler.artifact.kernels import KernelIndex

    index = KernelIndex.of(artifact.kernels)
    if not index.targets:
        raise ArtifactError(
            f"{file} has no GPU kernels. Compile the model for a GPU too, such as "
            "--target cpu,sm_100a."
        )
    if target is not None and target not in index.targets:
        raise TargetError(
            f"{file} has no kernels for {target}; it has some for {', '.join(index.targets)}."
        )
    found = {
        instance.name: instance
        for name, instance in index.all_instances()
        if instance.role == "gemm" and target in (None, name)
    }
    generated = [instance for instance in found.values() if not instance.is_packed]
    if len(generated) < len(found):
        names = ", ".join(name for name, instance in found.items() if instance.is_packed)
        text = f"{names}: {WHY_NOT_PACKED} `fpcompiler selftest {file}` runs them."
        if not generated:
            raise TargetError(text)
        print(f"warning: {text}", file=sys.stderr)
    return generated


def _recorded(instance: Instance, files: Mapping[str, Any]) -> dict[str, Any]:
    from fpcompiler.artifact import jsonfile

    name = instance.files.get("proof")
    if name is None:
        raise ArtifactError(f"{instance.name} came without a record; leave out --recorded.")
    record = jsonfile.parse(files[name], f"kernels/{name}", 64 << 20)
    if record.get("sha256") != instance.sha256:
        raise ArtifactError(f"kernels/{name} is the record of another library.")
    return record


def _proved(instance: Instance) -> dict[str, Any]:
    from fpcompiler.codegen.proof.stored import recorded_proof
    from fpcompiler.options import Options

    options = Options.from_env()
    with progress(f"compiling {instance.name}"):
        kernel = _kernel(instance)
    with progress(f"checking {instance.name}"):
        record = recorded_proof(kernel, options)
    same = kernel.metadata["sha256"] == instance.sha256
    return {**record, "of_the_file": same}


def _kernel(instance: Instance) -> BuiltKernel:
    from fpcompiler.codegen import cutlass
    from fpcompiler.codegen.build import KernelCache
    from fpcompiler.options import Options

    source = cutlass.emit(cutlass.parse_instance(dict(instance.problem)))
    return KernelCache.from_options(Options.from_env()).build(source)
