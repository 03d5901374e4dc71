"""The GPU kernels of an artifact, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fpcompiler.artifact.container import Buffer
    from fpcompiler.artifact.kernels import Instance

__all__ = ["HEADERS", "kernel_rows", "kernel_reasons"]

HEADERS: Final = ("GPU", "compute capability", "layers with kernels", "GEMMs", "proved", "size")


def kernel_rows(files: Mapping[str, Buffer]) -> list[tuple[str, str, str, str, str, str]]:
    """Return a row for each GPU that an artifact has kernels for.

    Args:
        files: Its kernels, by name.

    Raises:
        ArtifactError: If they are damaged.
    """
    from fpcompiler.artifact.kernels import KernelIndex
    from fpcompiler.runtime.tables import size_text

    rows = []
    for target in KernelIndex.of(files).targets.values():
        gemms = [i for i in target.instances.values() if i.role == "gemm"]
        with_kernels = sum(bool(layer.kernels) for layer in target.layers.values())
        size = sum(len(files[i.files["library"]]) for i in target.instances.values())
        rows.append(
            (
                target.target, ", ".join(target.capabilities),
                f"{with_kernels} of {len(target.layers)}", str(len(gemms)),
                _proved(gemms, files), size_text(size),
            )
        )  # fmt: skip
    return rows


def kernel_reasons(files: Mapping[str, Buffer]) -> list[tuple[str, str, str]]:
    """Return the layers without kernels: GPU, layer and reason.

    Args:
        files: The kernels of an artifact, by name.
    """
    from fpcompiler.artifact.kernels import KernelIndex

    return [
        (target.target, name, layer.reason)
        for target in KernelIndex.of(files).targets.values()
        for name, layer in target.layers.items()
        if layer.reason
    ]


def _proved(gemms: Sequence[Instance], files: Mapping[str, Buffer]) -> str:
    """Return how many have passed; no level of proof is for those of packed weights."""
    generated = [gemm for gemm in gemms if not gemm.is_packed]
    passed = sum(_passed(files[i.files["proof"]]) for i in generated if "proof" in i.files)
    packed = len(gemms) - len(generated)
    parts = [f"{passed} of {len(generated)}"] if generated else []
    return ", ".join(parts + ([f"{packed} by selftest only"] if packed else []))


def _passed(record: Buffer) -> bool:
    from fpcompiler.artifact import jsonfile

    found: Any = jsonfile.parse(record, "a proof record", 64 << 20)
    return found.get("passed") is True
