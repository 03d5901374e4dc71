"""Files of kernels as an artifact holds them."""

from __future__ import annotations

import hashlib

from fpcompiler.artifact import jsonfile
from fpcompiler.artifact.kernels import (
    INDEX,
    Instance,
    KernelIndex,
    LayerKernels,
    TargetKernels,
)


def kernel_index(library: bytes) -> KernelIndex:
    """Return an index of one library for one target, which runs one of two layers."""
    files = {"library": "sm_100a.gemm.so"}
    gemm = Instance("gemm", "gemm", {"k": 64}, files, hashlib.sha256(library).hexdigest())
    layers = {
        "up": LayerKernels({"decode": "gemm", "prefill": "gemm"}),
        "down": LayerKernels(reason="no instruction takes its formats"),
    }
    target = TargetKernels("sm_100a", ("10.0",), {"nvcc": "13.0.88"}, {"gemm": gemm}, layers)
    return KernelIndex({"sm_100a": target})


def kernel_files(library: bytes) -> dict[str, bytes]:
    """Return that library and its index, by name."""
    index = jsonfile.dump(kernel_index(library).to_json())
    return {INDEX: index, "sm_100a.gemm.so": library}
