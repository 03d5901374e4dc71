"""Level 5: what each kind of kernel must return on a Blackwell GPU, bit for bit.

The operands of a golden problem follow from its name, and what is expected of it from the model of
tensor cores (:mod:`fpcompiler.numerics.tensor_core`), so that no numbers are stored: only hashes,
in ``golden.json``, which show that another machine computes the same ones.

A result passes within a bound that holds for every order of additions and follows from the
instruction alone (:func:`~fpcompiler.numerics.tensor_core.error_bound`). How many numbers have the
very bits of the model is told beside it: a sharper prediction, which nobody has compared with a
Blackwell GPU here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.codegen.proof.matrix import Matrix, require_blackwell
from fpcompiler.codegen.proof.packing import PAIRS
from fpcompiler.errors import NumericsError
from fpcompiler.numerics.tensor_core import (
    BLACKWELL_F8F6F4,
    BLACKWELL_MXF4,
    Instruction,
    error_bound,
    tensor_core_gemm,
)
from fpcompiler.operand import Operand

_FILE: Final = Path(__file__).with_name("golden.json")

_ROUNDING: Final = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}
"""What rounding a result to its dtype changes at most, relative to the number."""


@dataclass(frozen=True)
class GoldenProblem:
    """One GEMM whose result is known: ``D = A @ B.T`` with block scales and nothing else.

    Attributes:
        weight: Element format and scales of B; there are no real scales.
        activation: The same of A.
        m: Rows of A.
        n: Rows of B, a multiple of 8.
        k: Values in a row of either, before padding.
    """

    weight: Operand
    activation: Operand
    m: int
    n: int
    k: int

    @property
    def kind(self) -> str:
        """The kind of the instruction, as :mod:`fpcompiler.target` calls it."""
        if self.weight.block is None:
            return "f8f6f4"
        if self.weight.block.format != "f8E8M0FNU":
            return "nvf4"
        both = {self.weight.format.name, self.activation.format.name}
        return "mxf4" if both == {"f4E2M1FN"} else "mxf8f6f4"

    @property
    def name(self) -> str:
        """Names the problem, and decides its operands."""
        return f"{self.kind} {self.weight} x {self.activation} {self.m}x{self.n}x{self.k}"

    @property
    def instruction(self) -> Instruction:
        """How the instruction rounds."""
        return BLACKWELL_MXF4 if self.kind in ("nvf4", "mxf4") else BLACKWELL_F8F6F4

    def operands(self) -> tuple[Matrix, Matrix]:
        """Return A and B.

        Raises:
            TargetError: If Blackwell has no such instruction.
        """
        require_blackwell(self.weight, self.activation)
        a = Matrix.random(self.activation, self.m, self.k, f"{self.name} activation")
        return a, Matrix.random(self.weight, self.n, self.k, f"{self.name} weight")

    def expected(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the result as the model has it, fp32 ``[M, N]``; a container's factor left out."""
        a, b = (matrix.factor().to(torch.device(device)) for matrix in self.operands())
        return tensor_core_gemm(a, b, self.instruction)

    def judge(self, result: Tensor) -> GoldenVerdict:
        """Compare what a kernel returned with what is expected.

        Args:
            result: ``[M, N]``, fp32 or bf16, on any device.

        Raises:
            NumericsError: If it is of another shape or dtype.
        """
        if result.shape != (self.m, self.n) or result.dtype not in _ROUNDING:
            raise NumericsError(
                f"{self.name}: a result is {self.m} x {self.n} of fp32 or bf16, "
                f"not {result.dtype} {list(result.shape)}."
            )
        own = result.detach().cpu()
        a, b = (matrix.factor() for matrix in self.operands())
        exact = a.scaled @ b.scaled.T
        bound = error_bound(a, b, self.instruction)
        bound = bound + _ROUNDING[own.dtype] * (exact.abs() + bound)
        error = (own.double() - exact).abs()
        # A comparison with NaN is false, so that what was not written counts as an error.
        parts = torch.where(error <= 0, 0.0, error / bound).nan_to_num(torch.inf)
        model = tensor_core_gemm(a, b, self.instruction).to(own.dtype)
        return GoldenVerdict(
            self.name, own.numel(), int((own == model).sum()), float(parts.max()),
            int((parts > 1).sum()),
        )  # fmt: skip


@dataclass(frozen=True)
class GoldenVerdict:
    """How a result compares with what was expected.

    Attributes:
        problem: The name of the problem.
        elements: Numbers in the result.
        equal: How many are those of the model.
        error: The largest error against the exact result, in parts of the bound.
        beyond: How many are beyond the bound.
    """

    problem: str
    elements: int
    equal: int
    error: float
    beyond: int

    @property
    def passed(self) -> bool:
        """Whether every number is within the bound."""
        return self.beyond == 0

    @property
    def as_modelled(self) -> bool:
        """Whether every number is that of the model."""
        return self.equal == self.elements


def _problems() -> tuple[GoldenProblem, ...]:
    return tuple(
        GoldenProblem(_without_real_scales(weight), _without_real_scales(activation), *shape)
        for weight, activation in PAIRS
        for shape in ((5, 40, 328), (130, 136, 256))
    )


def _without_real_scales(operand: Operand) -> Operand:
    return Operand(operand.format, (operand.block,) if operand.block else ())


GOLDEN: Final = _problems()
"""A few tokens with K and N ragged, and more than a tile of rows, for each kind and pair."""


def fingerprint(problem: GoldenProblem) -> Mapping[str, str]:
    """Return hashes of the stored operands and of the expected result of a problem."""
    stored = [matrix.stored() for matrix in problem.operands()]
    operands = [t for one in stored for t in (one.codes, one.scales) if t is not None]
    return MappingProxyType({
        "operands": _hash(operands), "expected": _hash([problem.expected()]),
    })  # fmt: skip


def recorded() -> Mapping[str, Mapping[str, str]]:
    """Return the hashes on record, by the name of the problem."""
    table: Mapping[str, Mapping[str, str]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return MappingProxyType(table)


def to_json(problems: tuple[GoldenProblem, ...] = GOLDEN) -> str:
    """Return the text of ``golden.json``."""
    table: dict[str, Any] = {problem.name: dict(fingerprint(problem)) for problem in problems}
    return json.dumps(table, indent=1) + "\n"


def _hash(tensors: list[Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:32]
