"""Level 7 for GEMMs that quantize their output: the bytes of a product that is quantized behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fpcompiler.artifact.kernels import QUANTIZED_USES
from fpcompiler.codegen.proof.golden import GoldenVerdict
from fpcompiler.numerics.packing import pack
from fpcompiler.numerics.scaling import quantize
from fpcompiler.operand import Operand
from fpcompiler.runtime import fused
from fpcompiler.runtime.cuda.form import CudaInput, InputKind, input_of_codes
from fpcompiler.runtime.cuda.kernels import CudaKernels
from fpcompiler.runtime.cuda.layers import CudaLinear, Gemm, Machine

__all__ = ["OutputProblem", "output_problems"]

_ROWS: Final = {"decode-quantized": (1, 77), "prefill-quantized": (130, 300)}
_N: Final = 256
_K: Final = 384
_NO_ACTIVATION: Final = "none"


@dataclass(frozen=True)
class OutputProblem:
    """A layer of random numbers by two kernels of one tile.

    Attributes:
        name: Of the kernel that quantizes its output.
        plain: The kernel that gives it.
        quantizing: The kernel that quantizes it.
        m: Rows of activations.
    """

    name: str
    plain: Gemm
    quantizing: Gemm
    m: int

    def judge(self, machine: Machine) -> GoldenVerdict:
        """Run both kernels, and quantize the first one's output on the CPU.

        Returns:
            How many bytes of codes and scales are the same; all must be.
        """
        made = self.quantizing.quantizing
        assert made is not None
        linear, x = self._layer(machine)
        kind = InputKind(Operand.parse(made.operand), _N, Operand.parse(made.operand).format.name)
        status = torch.zeros(1, dtype=torch.int32, device=machine.device)
        output = linear.multiply(x).cpu()
        if made.producer:
            output = fused.produce(output, None, None, None, None, made.producer, 0.0)
        codes, scales = quantize(output, Operand.parse(made.operand))
        expected = _bytes(input_of_codes(kind, [codes, *scales], None))
        found = _bytes(linear.multiply_quantized(x, kind, status))
        wrong = int((expected != found).sum())
        count = expected.numel()
        name = f"output to {made.operand} {made.producer} {self.m}x{_N}x{_K}"
        return GoldenVerdict(name, count, count - wrong, wrong / count, wrong)

    def _layer(self, machine: Machine) -> tuple[CudaLinear, CudaInput]:
        block = "" if self.plain.scale == "none" else f"@{self.plain.scale}"
        weight, activation = (Operand.parse(f"{f}{block}") for f in (self.plain.b, self.plain.a))
        codes, scales = quantize(_normal(_N, _K, seed=2), weight)
        w = [pack(codes, weight.format.storage_bits), *scales]
        uses = ("decode", "prefill")
        gemms = dict.fromkeys(uses, self.plain) | dict.fromkeys(QUANTIZED_USES, self.quantizing)
        linear = CudaLinear(gemms, machine, w, None, activation, weight, _K, self.plain.output)
        rows, of_rows = quantize(_normal(self.m, _K, seed=1).bfloat16(), activation)
        return linear, linear.prepare_codes([x.to(machine.device) for x in (rows, *of_rows)])


def output_problems(kernels: CudaKernels) -> Iterator[OutputProblem]:
    """Yield the problems of kernels that quantize their output, with those that give it."""
    seen = set()
    for row in kernels.target.layers.values():
        for use in QUANTIZED_USES:
            names = [row.kernels.get(each, "") for each in (use, use.removesuffix("-quantized"))]
            gemms = [kernels.gemms.get(name) for name in names]
            if names[0] in seen or None in gemms:
                continue
            seen.add(names[0])
            quantizing, plain = gemms
            if plain is not None and quantizing is not None and plain.activation == _NO_ACTIVATION:
                for m in _ROWS[use]:
                    yield OutputProblem(names[0], plain, quantizing, m)


def _bytes(x: CudaInput) -> Tensor:
    assert x.block_scale is not None
    return torch.cat([x.codes.reshape(-1).cpu(), x.block_scale.reshape(-1).cpu()])


def _normal(rows: int, k: int, seed: int) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
