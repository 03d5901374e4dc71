"""Times of tiles, estimated by ``nvidia-matmul-heuristics`` where that is installed.

It models NVIDIA's GPUs and needs none. It knows 8-bit and 4-bit operands, by letters for A, B, C,
the sum and D. Products of FP4 with FP6 or FP8 have the rate of FP8, so they are estimated as such;
their weights, half as many bytes, are not modelled.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final, Protocol

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
    """Estimates of ``nvidia-matmul-heuristics``.

    Attributes:
        module: The module ``nvMatmulHeuristics``.
        models: The model of each GPU that was asked for, filled on the way.
    """

    module: ModuleType
    models: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def seconds(
        self, problem: GemmProblem, tile: tuple[int, int, int], cluster: tuple[int, int]
    ) -> float | None:
        """Return the estimated time of a problem, or None where the library has none."""
        model = self._model(problem.machine.gpu)
        letters = _FP4 if problem.kind in ("mxf4", "nvf4") else _FP8
        layout = self.module.NvMatmulHeuristicsMatmulLayout.TN_ROW_MAJOR
        sizes = (problem.rows.typical, problem.padded_n, problem.padded_k)
        gemm = model.makeNvMatmulHeuristicsProblem(*sizes, layout)
        best = model.get(gemm, 1, precision=letters)
        if not best:
            return None
        # Its own choice has what we do not set: the instruction, stages, order of tiles.
        config = best[0]["nvmmhKernelConfiguration"]
        kernel = type(config).from_buffer_copy(config)
        kernel.cta[:], kernel.cluster[:], kernel.splitK = tile, cluster, 1
        kernel.warp[:] = (min(tile[0], 64), tile[1] // 2, tile[2])
        seconds = model.nvMatmulHeuristicsEstimateRuntime(
            model.handle,
            letters.encode("ascii"),
            ctypes.c_int(model.target),
            ctypes.byref(gemm),
            ctypes.byref(kernel),
            model.hardware_descriptor,
        )
        return float(seconds) or None

    def _model(self, gpu: str) -> Any:
        if gpu not in self.models:
            self.models[gpu] = self.module.NvMatmulHeuristicsInterfaceEx(
                backend=self.module.NvMatmulHeuristicsTarget.CUTLASS3,
                flags=self.module.NvMatmulHeuristicsFlags.PERF_MODEL_BASED_AUTO_TUNING,
                gpu=self.module.NvMatmulHeuristicsNvidiaGpu[gpu],
            )
        return self.models[gpu]


def load() -> MatmulHeuristics | None:
    """Return an estimator, or None if the package is not there in our version."""
    try:
        if importlib.metadata.version("nvidia-matmul-heuristics") != HEURISTICS_VERSION:
            return None
        return MatmulHeuristics(importlib.import_module("nvMatmulHeuristics"))
    except ImportError:
        return None
