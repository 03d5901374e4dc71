"""GPU architectures that kernels are compiled for: what nvcc calls them and where they load.

A row of :data:`fpcompiler.target.TARGETS` says what a machine multiplies; one such machine may have
several names for nvcc. ``sm_100a`` runs on compute capability 10.0 alone, ``sm_100f`` on its
family (CUDA C++ Programming Guide, "Family-Specific Features").
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fpcompiler.errors import TargetError
from fpcompiler.target import TARGETS, Target

__all__ = ["Arch", "ARCHS", "arch"]


@dataclass(frozen=True)
class Arch:
    """One architecture of nvcc.

    Attributes:
        name: What nvcc calls it, with ``sm_``.
        target: The name of the target whose instructions it has.
        collectives: The architecture of CUTLASS whose collectives are used: 90, 100 or 120.
        capabilities: Compute capabilities on which its code loads.
        nvcc: The first version of nvcc that knows it.
        gpu: Its GPU in ``nvidia-matmul-heuristics``.
    """

    name: str
    target: str
    collectives: int
    capabilities: tuple[tuple[int, int], ...]
    nvcc: tuple[int, int]
    gpu: str

    @property
    def suffix(self) -> str:
        """The name without ``sm_``, as in ``compute_100a``."""
        return self.name.removeprefix("sm_")

    @property
    def facts(self) -> Target:
        """What the machine multiplies."""
        return TARGETS[self.target]


_ROWS: Final = (
    Arch("sm_90a", "sm_90a", 90, ((9, 0),), (12, 8), "H100_SXM"),
    Arch("sm_100a", "sm_100a", 100, ((10, 0),), (12, 8), "B200"),
    Arch("sm_100f", "sm_100a", 100, ((10, 0), (10, 3)), (12, 9), "B200"),
    # The collectives of Sm100 run on 10.3 as well; those of Sm103 differ in FP4 only, by K=96.
    Arch("sm_103a", "sm_100a", 100, ((10, 3),), (12, 9), "GB300_NVL"),
    Arch("sm_120a", "sm_120a", 120, ((12, 0),), (12, 8), "RTX_5090"),
    Arch("sm_120f", "sm_120a", 120, ((12, 0), (12, 1)), (12, 9), "RTX_5090"),
    Arch("sm_121a", "sm_120a", 120, ((12, 1),), (12, 9), "RTX_5090"),
)

ARCHS: Final[Mapping[str, Arch]] = MappingProxyType({row.name: row for row in _ROWS})
"""Every architecture by name."""


def arch(name: str) -> Arch:
    """Return an architecture by name.

    Raises:
        TargetError: If kernels cannot be compiled for it; the message lists those that can.
    """
    if name in ARCHS:
        return ARCHS[name]
    near = difflib.get_close_matches(name, list(ARCHS), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise TargetError(
        f"CUDA kernels cannot be compiled for {name!r}. {hint}Architectures: {', '.join(ARCHS)}."
    )
