"""Level 1: packed codes and tiled scales hold for CUTLASS the numbers that they hold here.

Random codes and scales in the canonical layout are brought into the layout of kernels and
multiplied by CUTLASS's host reference. The exact result comes from the canonical form alone. Then
the same is done with bytes that are wrong in one way each: a check that these pass proves nothing.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpcompiler.codegen.proof.host_reference import HostReference, Stored
from fpcompiler.codegen.proof.matrix import Matrix, require_blackwell
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics import encode
from fpcompiler.numerics.kernel_layout import (
    K_ALIGNMENT,
    aligned,
    kernel_codes,
    kernel_scales,
    scale_bytes,
)
from fpcompiler.operand import Operand

N_ALIGNMENT: Final = 8
"""Rows of the weight are filled up to a multiple of it: 16 bytes of a row of bf16 output."""


class Mistake(enum.Enum):
    """A way in which the bytes of the weight (or of both, where one zero hides it) can be wrong."""

    SCALES_IN_ROWS = "scales row by row, not in tiles"
    CODES_SWAPPED = "neighbouring codes swapped"
    ROWS_NOT_PADDED = "rows follow each other without padding of K"
    PADDING_NOT_ZERO = "padding of K holds other codes than zero"


@dataclass(frozen=True)
class PackingProblem:
    """One GEMM.

    Attributes:
        weight: Element format and scales of the weight; real scales are left to the epilogue.
        activation: The same of the activation, with an equal block level.
        m: Rows of the activation.
        n: Rows of the weight.
        k: Values in a row of either.
    """

    weight: Operand
    activation: Operand
    m: int
    n: int
    k: int

    def mistakes(self) -> tuple[Mistake, ...]:
        """Return those that change the numbers of this problem."""
        block = self.weight.block
        found = {
            Mistake.CODES_SWAPPED: self.k > 1,
            Mistake.SCALES_IN_ROWS: block and (self.n > 1 or self.k > 4 * block.block),
            Mistake.ROWS_NOT_PADDED: self.k % K_ALIGNMENT and self.n > 1,
            Mistake.PADDING_NOT_ZERO: self.k % K_ALIGNMENT,
        }
        return tuple(mistake for mistake, possible in found.items() if possible)


@dataclass(frozen=True)
class PackingCase:
    """What one problem showed; errors are in parts of what rounding of fp32 can explain.

    Attributes:
        problem: The problem.
        held: The format that holds the weight's codes.
        relative_error: Of the result, in the Frobenius norm.
        error: The largest error of a number, in parts of ``K * 2**-24 * sum |a b|``.
        controls: The same error for each mistake.
    """

    problem: PackingProblem
    held: str
    relative_error: float
    error: float
    controls: Mapping[Mistake, float]

    @property
    def passed(self) -> bool:
        """Whether the right bytes gave the right result, and all wrong ones did not."""
        return self.error <= 1 and all(error > 1 for error in self.controls.values())

    def to_json(self) -> Mapping[str, Any]:
        """Return the record as JSON has it."""
        p = self.problem
        return MappingProxyType({
            "weight": str(p.weight), "activation": str(p.activation), "held": self.held,
            "m": p.m, "n": p.n, "k": p.k,
            "relative_error": self.relative_error, "error": self.error,
            "controls": {mistake.value: error for mistake, error in self.controls.items()},
            "passed": self.passed,
        })  # fmt: skip


@dataclass(frozen=True)
class PackingProof:
    """The record of a proof.

    Attributes:
        cutlass: The version of the headers.
        scale_layouts: Shapes ``(block, rows, k)`` for which every scale was found where CUTLASS's
            layouts of either operand look for it.
        scales_elsewhere: Shapes for which one was not.
        cases: The products.
    """

    cutlass: str
    scale_layouts: tuple[tuple[int, int, int], ...]
    scales_elsewhere: tuple[tuple[int, int, int], ...]
    cases: tuple[PackingCase, ...]

    @property
    def passed(self) -> bool:
        """Whether everything is as it should be, and there was something to look at."""
        return (
            bool(self.cases and self.scale_layouts)
            and not self.scales_elsewhere
            and all(case.passed for case in self.cases)
        )

    def to_json(self) -> Mapping[str, Any]:
        """Return the record as JSON has it."""
        return MappingProxyType({
            "cutlass": self.cutlass,
            "scale_layouts": [list(shape) for shape in self.scale_layouts],
            "scales_elsewhere": [list(shape) for shape in self.scales_elsewhere],
            "cases": [dict(case.to_json()) for case in self.cases],
            "passed": self.passed,
        })  # fmt: skip


_NVFP4: Final = "f4E2M1FN@tensor:f32/block16:f8E4M3FN"
_MXFP4: Final = "f4E2M1FN@block32:f8E8M0FNU"
_WEIGHTS: Final = ("f4E2M1FN", "f4E1M2FN", "f4E3M0FN")
_ACTIVATIONS: Final = ("f6E2M3FN", "f6E3M2FN", "f8E4M3FN")

PAIRS: Final = tuple(
    (Operand.parse(weight), Operand.parse(activation))
    for weight, activation in (
        (_NVFP4, _NVFP4),
        (_MXFP4, _MXFP4),
        *((f"{w}@row:f32/block32:f8E8M0FNU", f"{a}@block32:f8E8M0FNU")
          for w in _WEIGHTS for a in _ACTIVATIONS),
        *((f"{w}@row:f32", f"{a}@token:f32")
          for w in _WEIGHTS for a in (*_ACTIVATIONS, "f4E2M1FN")),
    )
)  # fmt: skip
"""Every pair of operands that there are Blackwell kernels for: weight, activation."""

SHAPES: Final = ((1, 8, 128), (77, 100, 200), (130, 136, 384))
"""M, N, K: one token; nothing whole; two tiles of rows."""

PROBLEMS: Final = tuple(PackingProblem(w, a, *shape) for w, a in PAIRS for shape in SHAPES)


def prove_packing(
    reference: HostReference, problems: Iterable[PackingProblem] = PROBLEMS
) -> PackingProof:
    """Compare products of packed buffers, and the places of scales, with CUTLASS.

    The host reference does one multiplication after the other (about 1 ns each), up to five times
    for each problem: a few rows of a layer prove its K as well as all of them.

    Raises:
        TargetError: If a problem is none of Blackwell's: its element formats have no exact
            container, or the block levels differ or are of another kind.
    """
    cases = tuple(_prove(reference, problem, seed) for seed, problem in enumerate(problems))
    shapes = {
        (c.problem.weight.block.block, rows, c.problem.k)
        for c in cases
        if c.problem.weight.block
        for rows in (c.problem.m, c.problem.n)
    }
    right = {shape for shape in shapes if _scales_are_found(reference, *shape)}
    return PackingProof(
        reference.cutlass_version, tuple(sorted(right)), tuple(sorted(shapes - right)), cases
    )


def _prove(reference: HostReference, problem: PackingProblem, seed: int) -> PackingCase:
    require_blackwell(problem.weight, problem.activation)
    a = Matrix.random(problem.activation, problem.m, problem.k, f"{seed} activation")
    b = Matrix.random(problem.weight, problem.n, problem.k, f"{seed} weight")
    values = a.values(), b.values()
    expected = values[0] @ values[1].T
    bound = values[0].abs() @ values[1].abs().T * (aligned(problem.k, K_ALIGNMENT) * 2.0**-24)
    alpha = 0.5
    factor = a.held.factor * b.held.factor / alpha

    def run(activation: Stored, weight: Stored) -> tuple[float, float]:
        padded = reference.gemm(activation, weight, alpha).double() * factor
        result, rest = padded[:, : problem.n], padded[:, problem.n :]
        error = (result - expected).abs()
        # Nothing is rounded where the bound is 0, so that any error is too large there.
        parts = torch.where(error == 0, 0.0, error / bound)
        parts = torch.cat([parts.flatten(), torch.where(rest == 0, 0.0, torch.inf).flatten()])
        return float(error.norm() / expected.norm()), float(parts.max())

    relative, part = run(a.stored(), b.stored(N_ALIGNMENT))
    controls = {m: run(*_wrong(a, b, m))[1] for m in problem.mistakes()}
    return PackingCase(problem, b.held.format.name, relative, part, MappingProxyType(controls))


def _wrong(a: Matrix, b: Matrix, mistake: Mistake) -> tuple[Stored, Stored]:
    """Return the bytes of both matrices with a mistake."""
    right = a.stored(), b.stored(N_ALIGNMENT)
    if mistake is Mistake.SCALES_IN_ROWS:
        return right[0], dataclasses.replace(right[1], scales=_scales_in_rows(b, right[1]))
    if mistake is Mistake.CODES_SWAPPED:
        pairs = b.codes[:, : b.codes.shape[1] // 2 * 2]
        swapped = pairs.reshape(len(pairs), -1, 2).flip(-1).flatten(1)
        codes = torch.cat([swapped, b.codes[:, pairs.shape[1] :]], dim=1)
        return right[0], dataclasses.replace(b, codes=codes).stored(N_ALIGNMENT)
    if mistake is Mistake.PADDING_NOT_ZERO:
        # In both: a zero of the other would hide it.
        return _filled(a).stored(), _filled(b).stored(N_ALIGNMENT)
    return right[0], dataclasses.replace(right[1], codes=_dense(b, right[1]))


def _dense(matrix: Matrix, stored: Stored) -> Tensor:
    """Return rows that follow each other, with the room that was left between them at the end."""
    spec, k = matrix.operand.format, matrix.codes.shape[1]
    rows = kernel_codes(matrix.packed, spec, k, held=matrix.held, k_alignment=4).flatten()
    return pad(rows, (0, stored.codes.numel() - rows.numel())).view(stored.codes.shape)


def _scales_in_rows(matrix: Matrix, stored: Stored) -> Tensor:
    assert matrix.scales is not None
    assert matrix.operand.block is not None
    assert stored.scales is not None
    blocks = stored.k // matrix.operand.block.block
    rows = pad(matrix.scales, (0, blocks - matrix.scales.shape[1])).flatten()
    return pad(rows, (0, stored.scales.numel() - rows.numel()))


def _filled(matrix: Matrix) -> Matrix:
    """Return a matrix with ones in place of padding, in codes and in scales."""
    rest = aligned(matrix.codes.shape[1], K_ALIGNMENT) - matrix.codes.shape[1]
    codes = pad(matrix.codes, (0, rest), value=_one(matrix.operand.format))
    block = matrix.operand.block
    if matrix.scales is None or block is None or block.spec is None:
        return dataclasses.replace(matrix, codes=codes)
    more = codes.shape[1] // block.block - matrix.scales.shape[1]
    scales = pad(matrix.scales, (0, more), value=_one(block.spec))
    return dataclasses.replace(matrix, codes=codes, scales=scales)


def _one(spec: FloatSpec) -> int:
    return int(encode(torch.ones(1), spec))


def _scales_are_found(reference: HostReference, block: int, rows: int, k: int) -> bool:
    """Return whether each scale, given a number of its own, is where CUTLASS's layouts look."""
    blocks = -(-k // block)
    numbers = torch.arange(rows * blocks).view(rows, blocks)
    # A number takes more than a byte: each byte of it goes the same way.
    parts = [(numbers >> shift & 255).to(torch.uint8) for shift in (0, 8, 16, 24)]
    found = torch.stack([kernel_scales(part, block, k) for part in parts], dim=-1)
    tiles = found.view(torch.int32).squeeze(-1)
    wanted = numbers.repeat_interleave(block, 1)[:, :k]
    padded = aligned(k, K_ALIGNMENT)
    for weights in (False, True):
        indices = reference.scale_indices(block, rows, padded, weights=weights)[:, :k]
        if int(indices.max()) >= scale_bytes(rows, padded // block):
            return False
        if not torch.equal(tiles[indices].long(), wanted):
            return False
    return True
