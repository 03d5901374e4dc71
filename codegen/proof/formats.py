"""Level 0: codes mean to CUTLASS what they mean here, and are rounded to alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fpcompiler.codegen.proof.host_reference import TYPES, HostReference
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.numerics import decode, encode, pack


@dataclass(frozen=True)
class FormatProof:
    """What the comparison of one format showed.

    Attributes:
        format: Its name.
        codes: How many codes were decoded: all.
        decoded_otherwise: How many of them CUTLASS gives another value.
        values: How many values were encoded.
        encoded_otherwise: How many of them CUTLASS gives another code.
        rounding: The rule that CUTLASS's codes were compared with.
    """

    format: str
    codes: int
    decoded_otherwise: int
    values: int
    encoded_otherwise: int
    rounding: str

    @property
    def passed(self) -> bool:
        """Whether there was no difference."""
        return not self.decoded_otherwise and not self.encoded_otherwise

    def to_json(self) -> Mapping[str, Any]:
        """Return the record as JSON has it."""
        return MappingProxyType({**vars(self), "passed": self.passed})


def prove_formats(
    reference: HostReference, names: Iterable[str] = tuple(TYPES)
) -> tuple[FormatProof, ...]:
    """Compare every code, and values around every place where rounding changes, with CUTLASS.

    The values are all numbers of the format, the middles between two neighbours, the fp32 numbers
    next to either, and every finite number of bfloat16. Block scales are never rounded by CUTLASS:
    its rule for E8M0, up to the next power of two, is one of several that
    :class:`~fpcompiler.operand.ScaleRounding` has, and what is compared there.
    """
    return tuple(_prove(reference, FORMATS[name]) for name in names)


def values_to_round(spec: FloatSpec) -> Tensor:
    """Return the values that :func:`prove_formats` encodes, fp32."""
    finite = sorted({value for value in spec.values if math.isfinite(value)})
    numbers = torch.tensor(finite, dtype=torch.float64)
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat([numbers, middles]).float()
    up, down = (torch.full_like(exact, sign * torch.inf) for sign in (1, -1))
    short = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16).float()
    around = [exact, exact.nextafter(up), exact.nextafter(down), short[short.isfinite()]]
    values = torch.cat(around)
    return values if spec.signed else values[values.sign() >= 0].abs()


def _prove(reference: HostReference, spec: FloatSpec) -> FormatProof:
    codes = torch.arange(spec.code_count, dtype=torch.uint8)
    theirs = reference.decode(pack(codes, spec.storage_bits), spec, len(codes))
    ours = decode(codes, spec)
    same = (theirs.view(torch.int32) == ours.view(torch.int32)) | theirs.isnan() & ours.isnan()
    values = values_to_round(spec)
    expected = encode(values, spec) if spec.zero else _next_power(values, spec)
    differ = reference.encode(values, spec) != expected
    return FormatProof(
        spec.name, len(codes), int((~same).sum()), len(values), int(differ.sum()),
        "to nearest, ties to even" if spec.zero else "up to the next power of two",
    )  # fmt: skip


def _next_power(values: Tensor, spec: FloatSpec) -> Tensor:
    """Return the code of the least power of two that is not below a value."""
    significand, exponent = torch.frexp(values.double())
    code = exponent - 1 + spec.bias + (significand > 0.5).to(torch.int32)
    return code.masked_fill(values == 0, 0).clamp(0, spec.max_code).to(torch.uint8)
