"""Level 7 for kernels of packed weights: layers of known numbers, against fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fpcompiler.codegen.proof.golden import GoldenVerdict
from fpcompiler.numerics.packing import pack
from fpcompiler.numerics.scaling import dequantize, quantize
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda.form import CudaInput
from fpcompiler.runtime.cuda.fragments import Mode
from fpcompiler.runtime.cuda.layers import CudaLinear, Gemm, Machine

__all__ = ["PackedProblem", "packed_problems"]

_ACTIVATIONS: Final = {
    Mode.INTEGERS: "f6E2M3FN@token:f32",
    Mode.E4M3: "f8E4M3FN@token:f32",
    Mode.BF16: "",
}
"""What is multiplied in each mode; plain bf16 where it is empty."""

_KEPT_BITS: Final = {Mode.INTEGERS: 21, Mode.E4M3: 11, Mode.BF16: 16}
"""Sums of integers are exact. Of FP8, chunks of 128 keep 13 bits below their largest term."""

_SHAPES: Final = ((1, 40, 328), (5, 40, 328), (130, 136, 256))


@dataclass(frozen=True)
class PackedProblem:
    """One layer ``x @ w.T`` of random numbers, without a bias.

    Attributes:
        mode: What the tensor cores multiply.
        weight: What the weights are.
        activation: What the activations are; None for plain bf16.
        m: Rows of activations.
        n: Rows of weights.
        k: Length of a row of either.
    """

    mode: Mode
    weight: Operand
    activation: Operand | None
    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        """Names the problem."""
        activation = self.activation or "bf16"
        return f"packed {self.weight} x {activation} {self.m}x{self.n}x{self.k}"

    def call(self, gemm: Gemm, machine: Machine) -> Callable[[], Tensor]:
        """Return what runs it on a kernel; everything that is done once is done."""
        linear = self._linear(gemm, machine)
        x = self._prepared(linear, machine)
        return lambda: linear.multiply(x)

    def judge(self, result: Tensor) -> GoldenVerdict:
        """Compare what a kernel returned with fp64.

        ``equal`` counts the results that are the exact ones, rounded once.

        Args:
            result: ``[M, N]``, on any device.
        """
        own = result.detach().cpu()
        x, w = self._values(self._x(), self.activation), self._values(self._w(), self.weight)
        exact = x @ w.T
        bound = 2.0 ** -_KEPT_BITS[self.mode] * (x.abs() @ w.abs().T)
        bound = bound + torch.finfo(own.dtype).eps / 2 * (exact.abs() + bound)
        error = (own.double() - exact).abs()
        # A comparison with NaN is false, so that what was not written counts as an error.
        parts = torch.where(error <= 0, 0.0, error / bound).nan_to_num(torch.inf)
        return GoldenVerdict(
            self.name, own.numel(), int((own == exact.to(own.dtype)).sum()), float(parts.max()),
            int((parts > 1).sum()),
        )  # fmt: skip

    def _x(self) -> Tensor:
        return _normal(self.m, self.k, seed=1).bfloat16()

    def _w(self) -> Tensor:
        return _normal(self.n, self.k, seed=2)

    def _linear(self, gemm: Gemm, machine: Machine) -> CudaLinear:
        codes, scales = quantize(self._w(), self.weight)
        w = [pack(codes, self.weight.format.storage_bits), *scales]
        return CudaLinear(
            {"decode": gemm}, machine, w, None, self.activation, self.weight, self.k, gemm.output
        )

    def _prepared(self, linear: CudaLinear, machine: Machine) -> CudaInput:
        x = self._x()
        if self.activation is None:
            return linear.prepare_values(x.to(machine.device))
        codes, scales = quantize(x, self.activation)
        return linear.prepare_codes([part.to(machine.device) for part in (codes, *scales)])

    @staticmethod
    def _values(x: Tensor, operand: Operand | None) -> Tensor:
        return (
            x.double() if operand is None else dequantize(*quantize(x, operand), operand).double()
        )


def packed_problems(
    gemm: Gemm, shapes: tuple[tuple[int, int, int], ...] = _SHAPES
) -> tuple[PackedProblem, ...]:
    """Return problems for a kernel: few and many rows, K and N ragged.

    Args:
        gemm: A kernel; without a mode or with an activation function it has none.
        shapes: M, N and K of each.
    """
    if gemm.mode is None or gemm.activation != "none":
        return ()
    block = "" if gemm.scale == "none" else f"/{gemm.scale}"
    text = _ACTIVATIONS[gemm.mode]
    weight = Operand.parse(f"{gemm.b}@row:f32{block}")
    activation = Operand.parse(text) if text else None
    return tuple(PackedProblem(gemm.mode, weight, activation, *shape) for shape in shapes)


def _normal(rows: int, k: int, seed: int) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
