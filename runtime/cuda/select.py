"""Which of the kernels in an artifact run on a GPU; decided when a model is loaded."""

from __future__ import annotations

import torch

from fpcompiler.artifact.kernels import KernelIndex, TargetKernels
from fpcompiler.errors import TargetError

Capability = tuple[int, int]
"""The compute capability of a GPU, such as (9, 0)."""


def capability_of(device: torch.device) -> Capability:
    """Return the compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def select(index: KernelIndex, capability: Capability) -> TargetKernels:
    """Return the kernels for a GPU; of several, those for the fewest other ones.

    Args:
        index: The kernels of an artifact; at least for one target.
        capability: What the GPU is.

    Raises:
        TargetError: If there are none for it; the message lists what there is.
    """
    wanted = f"{capability[0]}.{capability[1]}"
    fits = [target for target in index.targets.values() if wanted in target.capabilities]
    if fits:
        # Kernels for one GPU may use more of it than those for its whole family.
        return min(fits, key=lambda target: (len(target.capabilities), target.target))
    inside = "; ".join(
        f"{target.target} (compute capability {', '.join(target.capabilities)})"
        for target in index.targets.values()
    )
    raise TargetError(
        f"the artifact has no kernels for this GPU, which has compute capability {wanted}. It has "
        f"kernels for {inside}. Compile the model for this GPU too, or load it with kernels=False "
        "to run it as the reference does."
    )
