"""Instances of CUTLASS's GEMM template: a problem's types, and a tile for its range of M.

M, N and K are arguments of a kernel, and so are the scales and the bias (a null pointer means one,
or zero). What is left in an instance are element types, the activation function, the residual and
the tile, so that the layers of a model share a few instances.

The rule for tiles, best first in :func:`tiles`; CUTLASS's own generator lists the same shapes:

- Blackwell data centre (Sm100): one SM multiplies 128 rows, two neighbours 256. To decode, 128 x 64
  spreads the weights over twice as many SMs as 128 x 128. To prefill, two SMs share their operands.
- Blackwell RTX (Sm120): no clusters; block scales come in atoms of 128 rows, so tiles are at least
  128 x 128, to decode as well. 100 KB of shared memory leave room for K = 128.
- Hopper (Sm90): to decode, 64 x 64 in ping-pong; to prefill, two warp groups on 128 rows. Sums
  without the fast mode of FP8 take twice the registers, so that 128 x 256 spills (measured).
- Along K a tile is four instructions on Sm100: 256 for two FP4 operands, 128 for all others.

Where ``nvidia-matmul-heuristics`` is installed, it decides between the tiles of the list: to
prefill on Sm100 it mostly takes N = 256.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fpcompiler.codegen.arch import ARCHS, Arch
from fpcompiler.codegen.cutlass.heuristics import Estimator
from fpcompiler.codegen.cutlass.quantized import QuantizedOutput
from fpcompiler.codegen.problem import Activation, BlockScale, GemmProblem, OutputType, Rows
from fpcompiler.formats import FORMATS

__all__ = ["Instance", "Tile", "tiles", "instances", "choose"]


@dataclass(frozen=True)
class Tile:
    """How the output is divided.

    Attributes:
        m: Rows of D per tile.
        n: Columns of D per tile.
        k: Values of K per step.
        cluster: Thread blocks per cluster along M and N.
        sms: SMs that multiply one tile, each a share of its rows (Sm100).
        pingpong: Whether two warp groups take turns rather than share a tile (Sm90).
    """

    m: int
    n: int
    k: int
    cluster: tuple[int, int] = (1, 1)
    sms: int = 1
    pingpong: bool = False

    @property
    def of_one_sm(self) -> tuple[int, int, int]:
        """M, N and K of what one SM computes."""
        return self.m // self.sms, self.n, self.k

    def __str__(self) -> str:
        """Return the sizes, such as ``128x64x256`` or ``256x128x128c2x1``."""
        cluster = "" if self.cluster == (1, 1) else f"c{self.cluster[0]}x{self.cluster[1]}"
        return f"{self.m}x{self.n}x{self.k}{cluster}{'pp' if self.pingpong else ''}"


@dataclass(frozen=True)
class Instance:
    """One kernel to compile.

    Attributes:
        arch: The architecture's name.
        kind: The kind of instruction.
        a: Element format of the activations.
        b: Element format of the weights.
        scale: The block scales of both.
        output: Element type of D and the residual.
        activation: The function that the epilogue applies.
        residual: Whether the epilogue adds a tensor.
        tile: How the output is divided.
        quantized: What D has in place of the output; None for the output itself.
    """

    arch: str
    kind: str
    a: str
    b: str
    scale: BlockScale
    output: OutputType
    activation: Activation
    residual: bool
    tile: Tile
    quantized: QuantizedOutput | None = None

    @property
    def machine(self) -> Arch:
        """The architecture."""
        return ARCHS[self.arch]

    @property
    def name(self) -> str:
        """A name for people and files, different for different instances."""
        a, b = (FORMATS[name].short.lower() for name in (self.a, self.b))
        act = "" if self.activation is Activation.NONE else f"_{self.activation.value}"
        residual = "_residual" if self.residual else ""
        types = f"{self.kind}_{a}_{b}_{self.output.value}"
        quantized = f"_{self.quantized}" if self.quantized else ""
        return f"gemm_{self.arch}_{types}{act}{residual}{quantized}_{self.tile}"


def tiles(arch: str, kind: str, rows: Rows) -> tuple[Tile, ...]:
    """Return the tiles that a kernel may have, the default first.

    Args:
        arch: The architecture's name.
        kind: The kind of instruction.
        rows: The range of M.
    """
    k = 256 if kind in ("mxf4", "nvf4") else 128
    return _TILES[ARCHS[arch].collectives, rows](k)


def instances(problem: GemmProblem) -> tuple[Instance, ...]:
    """Return the instances that compute a problem, one for each tile, the default first."""
    found = tiles(problem.arch, problem.kind, problem.rows)
    return tuple(_instance(problem, tile) for tile in found)


def choose(
    problems: Iterable[GemmProblem], estimator: Estimator | None = None
) -> dict[GemmProblem, Instance]:
    """Choose instances for the problems of a model, one for all that differ in sizes only.

    With an estimator, the tile is the one with the least estimated time summed over those
    problems; where it has no estimate for one of the tiles, the rule's first tile is taken.

    Args:
        problems: All GEMMs of a model; one that occurs several times counts as often.
        estimator: Estimates times; :func:`fpcompiler.codegen.cutlass.heuristics.load` makes one.

    Returns:
        The instance of each problem.
    """
    groups: dict[tuple[Instance, ...], list[GemmProblem]] = {}
    for problem in problems:
        groups.setdefault(instances(problem), []).append(problem)
    chosen: dict[GemmProblem, Instance] = {}
    for candidates, group in groups.items():
        best = _best(candidates, group, estimator)
        chosen.update((problem, best) for problem in group)
    return chosen


def _best(
    candidates: tuple[Instance, ...], group: list[GemmProblem], estimator: Estimator | None
) -> Instance:
    if estimator is None:
        return candidates[0]
    times: list[float] = []
    for tile in (candidate.tile for candidate in candidates):
        found = [estimator.seconds(each, tile.of_one_sm, tile.cluster) for each in group]
        known = [seconds for seconds in found if seconds is not None]
        if len(known) < len(found):
            return candidates[0]
        times.append(sum(known))
    return candidates[times.index(min(times))]


def _instance(problem: GemmProblem, tile: Tile) -> Instance:
    return Instance(
        arch=problem.arch,
        kind=problem.kind,
        a=problem.activation.format.name,
        b=problem.weight.format.name,
        scale=problem.scale,
        output=problem.output,
        activation=problem.epilogue.activation,
        residual=problem.epilogue.residual,
        tile=tile,
    )


def _sm100_decode(k: int) -> tuple[Tile, ...]:
    return (Tile(128, 64, k),)


def _sm100_prefill(k: int) -> tuple[Tile, ...]:
    return Tile(256, 128, k, (2, 1), sms=2), Tile(256, 256, k, (2, 1), sms=2)


def _sm120(_: int) -> tuple[Tile, ...]:
    return (Tile(128, 128, 128),)


def _sm90_decode(k: int) -> tuple[Tile, ...]:
    return (Tile(64, 64, k, pingpong=True),)


def _sm90_prefill(k: int) -> tuple[Tile, ...]:
    return (Tile(128, 128, k, (2, 1)),)


_TILES: Final = {
    (100, Rows.DECODE): _sm100_decode,
    (100, Rows.PREFILL): _sm100_prefill,
    (120, Rows.DECODE): _sm120,
    (120, Rows.PREFILL): _sm120,
    (90, Rows.DECODE): _sm90_decode,
    (90, Rows.PREFILL): _sm90_prefill,
}
