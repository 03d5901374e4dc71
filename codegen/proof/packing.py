"""Level 1: packed codes and tiled scales hold for CUTLASS the numbers that they hold here.

Random codes and scales in the canonical layout are brought into the layout of kernels and
multiplied by CUTLASS's host reference. The exact result comes from the canonical form alone. Then
the same is done with bytes that are wrong in one way each: a check that these pass proves nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpcompiler.codegen.proof.host_reference import HostReference, Stored
from fpcompiler.errors import TargetError
from fpcompiler.formats import FORMATS
from fpcompiler.numerics import decode, encode, pack
from fpcompiler.numerics.kernel_layout import (
    K_ALIGNMENT,
    aligned,
    kernel_codes,
    kernel_scales,
    scale_bytes,
)
from fpcompiler.numerics.shift_lowering import Container, container
from fpcompiler.operand import Operand

N_ALIGNMENT: Final = 8
"""Rows of the weight are filled up to a multiple of it: 16 bytes of a row of bf16 output."""

_HELD_IN: Final = tuple(FORMATS[n] for n in ("f4E2M1FN", "f6E2M3FN", "f6E3M2FN", "f8E4M3FN"))
"""What the instructions take, the narrowest first."""


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
        """Return those that change the bytes of this problem."""
        found = [Mistake.CODES_SWAPPED]
        if self.weight.block:
            found.append(Mistake.SCALES_IN_ROWS)
        if self.k % K_ALIGNMENT:
            found += [Mistake.ROWS_NOT_PADDED, Mistake.PADDING_NOT_ZERO]
        return tuple(found)


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


@dataclass(frozen=True, eq=False)
class _Matrix:
    """Random codes and scales, one a byte, and how they are held."""

    operand: Operand
    held: Container
    codes: Tensor
    scales: Tensor | None

    @classmethod
    def random(cls, operand: Operand, rows: int, k: int, generator: torch.Generator) -> _Matrix:
        spec, block = operand.format, operand.block
        finite = torch.tensor(spec.values).isfinite()
        codes = _bytes(rows, k, 0, spec.code_count, generator)
        codes.masked_fill_(~finite[codes.int()], 0)
        scales = None
        if block:
            # E8M0: 2**-6 to 2**6. E4M3: every positive number.
            low, high = (121, 134) if block.format == "f8E8M0FNU" else (1, 127)
            scales = _bytes(rows, -(-k // block.block), low, high, generator)
        return cls(operand, container(spec, 0, _HELD_IN), codes, scales)

    def values(self) -> Tensor:
        """Return what the canonical form stands for, without real scales: fp64 ``[rows, K]``."""
        values = decode(self.codes, self.operand.format, torch.float64)
        block = self.operand.block
        if self.scales is None or block is None or block.spec is None:
            return values
        scales = decode(self.scales, block.spec, torch.float64)
        return values * scales.repeat_interleave(block.block, 1)[:, : values.shape[1]]

    def stored(self, row_alignment: int, mistake: Mistake | None = None) -> Stored:
        """Return the bytes for a kernel, wrong in one way if a mistake is given."""
        spec, k = self.operand.format, self.codes.shape[1]
        codes = self.codes
        if mistake is Mistake.CODES_SWAPPED:
            codes = codes.view(len(codes), -1, 2).flip(-1).reshape(codes.shape)
        packed = pack(codes, spec.storage_bits)
        right = kernel_codes(packed, spec, k, held=self.held, row_alignment=row_alignment)
        if mistake is Mistake.PADDING_NOT_ZERO:
            one = int(encode(torch.ones(1), spec))
            filled = pad(codes, (0, aligned(k, K_ALIGNMENT) - k), value=one)
            packed = pack(filled, spec.storage_bits)
            right = kernel_codes(
                packed, spec, filled.shape[1], held=self.held, row_alignment=row_alignment
            )
        if mistake is Mistake.ROWS_NOT_PADDED:
            dense = kernel_codes(packed, spec, k, held=self.held, k_alignment=4).flatten()
            right = pad(dense, (0, right.numel() - dense.numel())).view(right.shape)
        return self._with_scales(right, mistake)

    def _with_scales(self, codes: Tensor, mistake: Mistake | None) -> Stored:
        block = self.operand.block
        if self.scales is None or block is None:
            return Stored(codes, self.held.format)
        k = self.codes.shape[1]
        fill = (0, 0, 0, codes.shape[0] - self.scales.shape[0])
        scales = pad(self.scales, fill)
        tiles = kernel_scales(scales, block.block, k)
        if mistake is Mistake.SCALES_IN_ROWS:
            rows = pad(scales, (0, aligned(k, K_ALIGNMENT) // block.block - scales.shape[1]))
            tiles = pad(rows.flatten(), (0, tiles.numel() - rows.numel()))
        return Stored(codes, self.held.format, tiles, block.format)


def _prove(reference: HostReference, problem: PackingProblem, seed: int) -> PackingCase:
    _require_blackwell(problem)
    generator = torch.Generator().manual_seed(seed)
    a = _Matrix.random(problem.activation, problem.m, problem.k, generator)
    b = _Matrix.random(problem.weight, problem.n, problem.k, generator)
    values = a.values(), b.values()
    expected = values[0] @ values[1].T
    bound = values[0].abs() @ values[1].abs().T * (aligned(problem.k, K_ALIGNMENT) * 2.0**-24)
    alpha = 0.5
    factor = a.held.factor * b.held.factor / alpha

    def run(mistake: Mistake | None) -> tuple[float, float]:
        weight = b.stored(N_ALIGNMENT, mistake)
        both = mistake if mistake is Mistake.PADDING_NOT_ZERO else None
        padded = reference.gemm(a.stored(1, both), weight, alpha).double() * factor
        result, rest = padded[:, : problem.n], padded[:, problem.n :]
        if mistake is None and bool(rest.any()):
            return torch.inf, torch.inf
        error = (result - expected).abs()
        # Nothing was added where the bound is 0: any error is too large.
        parts = torch.where(error == 0, 0.0, error / bound)
        return float(error.norm() / expected.norm()), float(parts.max())

    relative, part = run(None)
    controls = {mistake: run(mistake)[1] for mistake in problem.mistakes()}
    return PackingCase(problem, b.held.format.name, relative, part, MappingProxyType(controls))


def _scales_are_found(reference: HostReference, block: int, rows: int, k: int) -> bool:
    """Return whether each scale, given a number of its own, is where CUTLASS's layouts look."""
    blocks = -(-k // block)
    numbers = torch.arange(rows * blocks).view(rows, blocks)
    # A number takes more than a byte: each byte of it goes the same way.
    low, high = ((numbers >> shift & 255).to(torch.uint8) for shift in (0, 8))
    tiles = kernel_scales(low, block, k).int() + (kernel_scales(high, block, k).int() << 8)
    wanted = numbers.repeat_interleave(block, 1)[:, :k]
    padded = aligned(k, K_ALIGNMENT)
    for weights in (False, True):
        indices = reference.scale_indices(block, rows, padded, weights=weights)[:, :k]
        if int(indices.max()) >= scale_bytes(rows, padded // block):
            return False
        if not torch.equal(tiles[indices].long(), wanted):
            return False
    return True


def _bytes(rows: int, columns: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, (rows, columns), dtype=torch.uint8, generator=generator)


def _require_blackwell(problem: PackingProblem) -> None:
    blocks = {
        (level.block, level.format) if level else None
        for level in (problem.weight.block, problem.activation.block)
    }
    if len(blocks) > 1 or not blocks <= {None, (32, "f8E8M0FNU"), (16, "f8E4M3FN")}:
        raise TargetError(
            f"Blackwell multiplies operands of equal blocks, of 32 with E8M0 or of 16 with E4M3, "
            f"not w={problem.weight},a={problem.activation}."
        )
