"""What a tensor core computes, bit for bit: sums of products as instructions round them.

An instruction adds ``k`` products to an fp32 accumulator at once. All terms are aligned to the
largest exponent among them, cut off after a number of fraction bits, added exactly, and the sum is
cut off again to the accumulator's significand. With ``top`` the largest exponent::

    sum  = trunc(acc * 2**(f - top)) + (trunc(a_i * b_i * 2**(f - top)) for each i)
    acc' = sum * 2**(top - f), cut off after r fraction bits of its own significand

The exponent of a product is the sum of those of its factors and of their scales; that its
significand may reach 4 does not raise it. A subnormal number has the smallest exponent of its
format. A factor of zero takes no part. FP4 by FP4 is different: 16 products at a time are added
exactly, the significands of the two scales multiply that sum, and the exponent of such a term is
that of its scales alone.

Source: MMA-Sim (arXiv 2511.10909; github.com/microsoft/MMA-Sim), whose authors fitted these rules
to H100, B200 and RTX PRO 6000. What is known here beyond that:

* the Hopper rules are compared with an H200 in ``examples/benchmarks/tensor_core_model.py``;
* nothing of Blackwell has been compared with a GPU by us;
* **E2M1, E2M3 and E3M2 in mxf8f6f4 and f8f6f4 are an extrapolation**: MMA-Sim runs E4M3 and E5M2
  only there. That a subnormal number of theirs is aligned by the smallest exponent of its own
  format (not as a normal number of a wider one) is assumed. A result can differ by that in the last
  bits that 25 fraction bits keep, and stays within :func:`error_bound`.

Results are defined for finite operands. Everything is done in fp64, which holds each intermediate
number exactly, on the device of the operands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.scratch import chunks

_SMALLEST_EXPONENT: Final = -126
"""Of normal numbers of fp32; the accumulator is never below it, even if it is zero."""

_NO_EXPONENT: Final = -4096
"""Of a zero: never the largest."""

_LEAST_POWER: Final = -1022
"""Exponent of the smallest normal number of fp64."""


@dataclass(frozen=True)
class Instruction:
    """How one kind of matrix instruction rounds.

    Attributes:
        name: What the instruction set calls it.
        k: Products that one instruction adds to the accumulator.
        group: Products that are added exactly before anything is aligned.
        fraction_bits: Fraction bits that aligned terms keep.
        result_bits: Fraction bits that the accumulator keeps.
    """

    name: str
    k: int
    group: int
    fraction_bits: int
    result_bits: int


HOPPER_FP8: Final = Instruction("wgmma f8f8 (sm_90a)", 32, 1, 13, 13)
"""The accumulator of FP8 on Hopper has 13 fraction bits, in an fp32 register."""

HOPPER_BF16: Final = Instruction("wgmma bf16 (sm_90a)", 16, 1, 25, 23)

BLACKWELL_F8F6F4: Final = Instruction("f8f6f4, mxf8f6f4", 32, 1, 25, 23)
"""``tcgen05.mma`` on sm_100a and ``mma.sync`` on sm_120a, with block scales and without."""

BLACKWELL_MXF4: Final = Instruction("mxf4, mxf4nvf4", 64, 16, 35, 23)
"""FP4 by FP4 with block scales, on sm_100a and sm_120a."""


@dataclass(frozen=True, eq=False)
class Factor:
    """One matrix, as a tensor core sees it.

    Attributes:
        values: fp64 ``[R, K]``, without scales.
        exponents: int32 ``[R, K]``, of the values.
        scale_values: fp64 ``[R, K / block]``: block scales divided by ``2**scale_exponents``.
        scale_exponents: int32 ``[R, K / block]``.
        block: Values that share a scale.
    """

    values: Tensor
    exponents: Tensor
    scale_values: Tensor
    scale_exponents: Tensor
    block: int

    @classmethod
    def of_codes(
        cls,
        codes: Tensor,
        spec: FloatSpec,
        scales: Tensor | None = None,
        scale_spec: FloatSpec | None = None,
    ) -> Factor:
        """Return the factor that codes and the codes of their block scales stand for.

        Args:
            codes: uint8 ``[R, K]``, one code a byte.
            spec: Their format.
            scales: uint8 ``[R, K / block]``; None for no scales.
            scale_spec: The format of the scales: ``f8E8M0FNU`` or ``f8E4M3FN``.

        Raises:
            NumericsError: If a code is not a finite number, or the shapes do not fit.
        """
        values, exponents = _split(codes, spec)
        if scales is None or scale_spec is None:
            return _unscaled(values, exponents)
        rows, k = codes.shape
        if scales.ndim != 2 or scales.shape[0] != rows or not scales.shape[1]:
            raise NumericsError(f"scales {list(scales.shape)} do not fit codes {rows} x {k}.")
        if k % scales.shape[1]:
            raise NumericsError(
                f"{k} values cannot have {scales.shape[1]} scales: pad K to whole blocks, with "
                "codes of zero."
            )
        magnitudes, scale_exponents = _split(scales, scale_spec)
        # The sign of an E4M3 scale is no part of it: the hardware reads it as UE4M3.
        significands = magnitudes.abs() * _power(-scale_exponents.clamp(min=_LEAST_POWER))
        return cls(values, exponents, significands, scale_exponents, k // scales.shape[1])

    @classmethod
    def of_bf16(cls, values: Tensor) -> Factor:
        """Return the factor of bfloat16 values ``[R, K]``.

        Raises:
            NumericsError: If the values are of another dtype, or not finite.
        """
        if values.dtype != torch.bfloat16 or values.ndim != 2:
            raise NumericsError(f"expected bf16 [R, K], not {values.dtype} {list(values.shape)}.")
        wide = values.double()
        _require_finite(wide)
        return _unscaled(wide, _exponent(wide).masked_fill_(wide == 0, _NO_EXPONENT))

    @property
    def scaled(self) -> Tensor:
        """The values times their block scales, fp64 ``[R, K]``."""
        return self.values * self._repeated(self.scale_values)

    @property
    def ceiling(self) -> Tensor:
        """Scaled magnitudes in which a subnormal significand counts as 1, fp64 ``[R, K]``."""
        plain = torch.maximum(self.values.abs(), _power(self.exponents.clamp(min=_LEAST_POWER)))
        plain = plain.masked_fill(self.values == 0, 0.0)
        return plain * self._repeated(self.scale_values.clamp(min=1.0))

    def rows(self, part: slice) -> Factor:
        """Return some of the rows."""
        return self._map(lambda tensor: tensor[part])

    def to(self, device: torch.device) -> Factor:
        """Return the factor on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Factor:
        return Factor(
            change(self.values), change(self.exponents), change(self.scale_values),
            change(self.scale_exponents), self.block,
        )  # fmt: skip

    def _repeated(self, significands: Tensor) -> Tensor:
        """Return scales of significands, one for each value."""
        scales = significands * _power(self.scale_exponents.clamp(min=_LEAST_POWER))
        return scales.repeat_interleave(self.block, dim=1)


def tensor_core_gemm(a: Factor, b: Factor, instruction: Instruction) -> Tensor:
    """Return ``a @ b.T`` as a chain of instructions along K computes it, from an accumulator of 0.

    Args:
        a: ``[M, K]``.
        b: ``[N, K]``.
        instruction: The rounding rules. K is filled up with zeros to a multiple of its ``k``.

    Returns:
        fp32 ``[M, N]``.

    Raises:
        NumericsError: If the factors do not fit each other or the instruction, or a sum is beyond
            fp32.
    """
    _require_fit(a, b, instruction)
    m, n = a.values.shape[0], b.values.shape[0]
    result = torch.empty((m, n), dtype=torch.float32, device=a.values.device)
    for part in chunks(m, n * instruction.k // instruction.group, result.device):
        result[part] = _chain(a.rows(part), b, instruction)
    if not bool(result.isfinite().all()):
        raise NumericsError("a sum is beyond fp32; the model of tensor cores ends there.")
    return result


def error_bound(a: Factor, b: Factor, instruction: Instruction) -> Tensor:
    """Return how far :func:`tensor_core_gemm` can be from the exact ``a @ b.T``.

    The bound is ``K * 2**-24 * sum |a b|`` where aligned terms keep 25 fraction bits or more. Each
    of the ``K / k`` instructions cuts off ``k + 1`` terms by less than ``2**-25 * 2**top`` and the
    sum by ``2**-23`` of itself; both are bounded by ``sum |a b|`` if a subnormal significand counts
    as 1, and ``17/16 * 2**-25 + 2**-23 / 16 < 2**-24``. With 13 bits it is ``K * 2**-12 * ...``.
    ``K`` is that of whole instructions. The order in which a kernel adds makes no difference to it.

    Returns:
        fp64 ``[M, N]``.

    Raises:
        NumericsError: As :func:`tensor_core_gemm` does.
    """
    _require_fit(a, b, instruction)
    bits = min(instruction.fraction_bits, instruction.result_bits + 2)
    k = -(-a.values.shape[1] // instruction.k) * instruction.k
    return a.ceiling @ b.ceiling.T * (k * 2.0 ** (1 - bits))


def _chain(a: Factor, b: Factor, instruction: Instruction) -> Tensor:
    accumulator = a.values.new_zeros(a.values.shape[0], b.values.shape[0])
    for start in range(0, a.values.shape[1], instruction.k):
        terms, exponents = [], []
        for first in range(start, min(start + instruction.k, a.values.shape[1]), _span(a, b)):
            part = slice(first, min(first + _span(a, b), start + instruction.k))
            value, exponent = _terms(a, b, part, instruction.group)
            terms.append(value)
            exponents.append(exponent)
        top = torch.cat([e.amax(0, keepdim=True) for e in exponents]).amax(0)
        accumulator = _add(accumulator, terms, top, instruction)
    return accumulator.float()


def _span(a: Factor, b: Factor) -> int:
    """Return over how many values neither scale changes."""
    return min(a.block, b.block)


def _terms(a: Factor, b: Factor, part: slice, group: int) -> tuple[Tensor, Tensor]:
    """Return terms and exponents of values that share a scale: ``[terms, M, N]``, or ``[1, ..]``.

    With groups there is one term, and the exponent is that of the scales.
    """
    left, right = a.values[:, part], b.values[:, part]
    ia, ib = part.start // a.block, part.start // b.block
    scale = a.scale_values[:, ia, None] * b.scale_values[None, :, ib]
    shift = a.scale_exponents[:, ia, None] + b.scale_exponents[None, :, ib]
    factor = scale * _power(shift.clamp(min=_LEAST_POWER))
    if group > 1:
        # Sums of FP4 products are exact in fp64 in any order.
        runs = [slice(i, i + group) for i in range(0, left.shape[1], group)]
        sums = [left[:, run] @ right[:, run].T for run in runs]
        return torch.stack(sums) * factor, shift[None]
    exponents = a.exponents[:, part].T[:, :, None] + b.exponents[:, part].T[:, None, :]
    return left.T[:, :, None] * right.T[:, None, :] * factor, exponents + shift


def _add(accumulator: Tensor, terms: list[Tensor], top: Tensor, instruction: Instruction) -> Tensor:
    """Return the accumulator after one instruction, fp64 ``[M, N]``."""
    top = torch.maximum(top, _exponent(accumulator))
    unit = _power(instruction.fraction_bits - top)
    total = (accumulator * unit).trunc_()
    for term in terms:
        total += (term * unit).trunc_().sum(0)
    total *= _power(top - instruction.fraction_bits)
    total.masked_fill_(total.abs() >= 2.0**128, torch.inf)
    step = _power(instruction.result_bits - _exponent(total))
    # A sum of zero is positive, also where -0.0 was cut off.
    return (total * step).trunc_().div_(step).add_(0.0)


def _exponent(values: Tensor) -> Tensor:
    """Return ``floor(log2(|x|))``, int32; that of the smallest normal number at least."""
    exponents = (values.abs().view(torch.int64) >> 52).sub_(1023).to(torch.int32)
    return exponents.clamp_(min=_SMALLEST_EXPONENT)


def _power(exponents: Tensor) -> Tensor:
    """Return ``2**e`` exactly: fp64, for integers from -1022 to 1023."""
    return ((exponents.to(torch.int64) + 1023) << 52).view(torch.float64)


def _unscaled(values: Tensor, exponents: Tensor) -> Factor:
    one = values.new_ones(values.shape[0], 1)
    zero = exponents.new_zeros(values.shape[0], 1)
    return Factor(values, exponents, one, zero, max(values.shape[1], 1))


def _split(codes: Tensor, spec: FloatSpec) -> tuple[Tensor, Tensor]:
    """Return the values and exponents of codes: fp64 and int32."""
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise NumericsError(f"codes are uint8 [R, K], not {codes.dtype} {list(codes.shape)}.")
    values, exponents = (table.to(codes.device) for table in _tables(spec))
    index = codes.reshape(-1).to(torch.int32)
    found = values.index_select(0, index).view(codes.shape)
    _require_finite(found)
    return found, exponents.index_select(0, index).view(codes.shape)


@lru_cache(maxsize=32)
def _tables(spec: FloatSpec) -> tuple[Tensor, Tensor]:
    """Return the value and the exponent of every byte; bits above those of a code do not count."""
    fields = [(code & (1 << spec.magnitude_bits) - 1) >> spec.mantissa_bits for code in range(256)]
    exponents = torch.tensor(
        [max(f, int(spec.zero)) - spec.bias for f in fields], dtype=torch.int32
    )
    values = torch.tensor(spec.values * (256 // spec.code_count), dtype=torch.float64)
    return values, exponents.masked_fill_(values == 0, _NO_EXPONENT)


def _require_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise NumericsError("the model of tensor cores takes finite numbers only.")


def _require_fit(a: Factor, b: Factor, instruction: Instruction) -> None:
    if a.values.shape[1] != b.values.shape[1]:
        raise NumericsError(
            f"K differs: {list(a.values.shape)} times the transpose of {list(b.values.shape)}."
        )
    for block in {a.block, b.block} - {a.values.shape[1]}:
        ends_inside = block % instruction.k and instruction.k % block
        if ends_inside or block % instruction.group:
            raise NumericsError(f"blocks of {block} values do not fit {instruction.name}.")
