"""Times of tiles, estimated by ``nvidia-matmul-heuristics`` where that is installed.

It models NVIDIA's GPUs and needs none. It knows 8-bit and 4-bit operands, by letters for A, B, C,
the sum and D. Products of FP4 with FP6 or FP8 have the rate of FP8, so they are estimated as such;
their weights, half as many bytes, are not modelled.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Final, Protocol

from fpcompiler.codegen.arch import ARCHS
from fpcompiler.codegen.problem import GemmProblem

__all__ = ["Estimator", "MatmulHeuristics", "load", "HEURISTICS_VERSION"]

HEURISTICS_VERSION: Final = "0.1.0.27"
"""The version of ``nvidia-matmul-heuristics`` that is used; with others the rule decides alone.

Estimates of a given tile come from its C library, whose interface other versions may change.
"""

_FP8: Final = "QQTST"  # E4M3, sums of fp32, bf16 out
_FP4: Final = "OOTST"


class Estimator(Protocol):
    """Estimates what a tile costs."""

    def seconds(
        self, problem: GemmProblem, tile: tuple[int, int, int], cluster: tuple[int, int]
    ) -> float | None:
        """Return the estimated time of a problem, or None for no estimate.

        Args:
            problem: Its sizes and formats; M is the typical one of its range.
            tile: M, N and K of the tile of one SM.
            cluster: Thread blocks per cluster, along M and N.
        """


@dataclass(frozen=True)
class MatmulHeuristics:
    """Estimates of ``nvidia-matmul-heuristics`` for one architecture.

    Attributes:
        arch: The architecture's name.
        module: The module ``nvMatmulHeuristics``.
    """

    arch: str
    module: ModuleType

    def seconds(
        self, problem: GemmProblem, tile: tuple[int, int, int], cluster: tuple[int, int]
    ) -> float | None:
        """Return the estimated time of a problem, or None where the library has none."""
        model, layout = self._model, self.module.NvMatmulHeuristicsMatmulLayout.TN_ROW_MAJOR
        letters = _FP4 if problem.kind in ("mxf4", "nvf4") else _FP8
        m = problem.rows.typical
        gemm = model.makeNvMatmulHeuristicsProblem(m, problem.padded_n, problem.padded_k, layout)
        best = model.get(gemm, 1, precision=letters)
        if not best:
            return None
        # Its own choice has what we do not set: the instruction, warps, stages, order of tiles.
        kernel = type(best[0]["nvmmhKernelConfiguration"]).from_buffer_copy(
            best[0]["nvmmhKernelConfiguration"]
        )
        kernel.cta[:], kernel.cluster[:], kernel.splitK = tile, cluster, 1
        seconds = model.nvMatmulHeuristicsEstimateRuntime(
            model.handle,
            letters.encode("ascii"),
            ctypes.c_int(model.target),
            ctypes.byref(gemm),
            ctypes.byref(kernel),
            model.hardware_descriptor,
        )
        return float(seconds) or None

    @cached_property
    def _model(self) -> Any:
        return self.module.NvMatmulHeuristicsInterfaceEx(
            backend=self.module.NvMatmulHeuristicsTarget.CUTLASS3,
            flags=self.module.NvMatmulHeuristicsFlags.PERF_MODEL_BASED_AUTO_TUNING,
            gpu=self.module.NvMatmulHeuristicsNvidiaGpu[ARCHS[self.arch].gpu],
        )


def load(arch: str) -> MatmulHeuristics | None:
    """Return estimates for an architecture, or None if the package is not there in our version."""
    try:
        if importlib.metadata.version("nvidia-matmul-heuristics") != HEURISTICS_VERSION:
            return None
        return MatmulHeuristics(arch, importlib.import_module("nvMatmulHeuristics"))
    except ImportError:
        return None
