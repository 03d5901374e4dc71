"""Rounding to a format, and between values and codes.

Rounding adds and subtracts a number so large that the sum has no room for the bits to drop:
``(v + c) - c`` with ``c = 1.5 * 2**(e + 23 - m)``, where ``2**e <= |v| < 2**(e + 1)``, leaves ``v``
with ``m`` bits after the leading one, and the adder itself rounds to nearest even. With ``e`` held
at the smallest exponent of the format the same addition rounds its subnormal numbers. No other step
rounds, so the result is exact. The sum holds the code as well: its low bits are the integer
``n = v / step``, and the magnitude bits of the code are ``|n| + ((e - e_min) << m)``.

The exponent is read from ``v`` rounded to bfloat16: where that carries ``v`` into the next binade,
``v`` is so close to its end that both steps round it to the same number.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError
from fpcompiler.formats import FloatSpec
from fpcompiler.numerics.scratch import Scratch, chunks

_SIGNIFICAND_BITS = {torch.float32: 23, torch.float64: 52}
_EXPONENT_BIAS = {torch.float32: 127, torch.float64: 1023}
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
_BF16_BITS = 7
_BF16_BIAS = 127


def round_to(x: Tensor, spec: FloatSpec) -> Tensor:
    """Return the nearest values of a format, saturating at its largest; NaN stays NaN.

    A tie goes to the even multiple of the step: to the even mantissa, and between two powers of
    two, where a format has no mantissa, to the larger (as in ml_dtypes and in LLM-FP4, arXiv
    2310.16836).

    Args:
        x: Values of any floating-point dtype and shape.
        spec: The format.

    Returns:
        fp32 (fp64 for fp64), shape of ``x``. A value that rounds to zero keeps its sign.

    Raises:
        NumericsError: If ``x`` is not floating-point.
    """
    result = _working_copy(x)
    if not spec.zero:
        powers = decode(_encode_power(result, spec), spec, result.dtype)
        return torch.where(result.isnan(), result, powers)
    flat, scratch = result.view(-1), Scratch(x.device)
    for part in chunks(flat.numel(), 1, x.device):
        value = flat[part]
        rounded = scratch.take("rounded", value.shape, value.dtype)
        round_into(rounded, value, spec, scratch)
        if spec.signed:
            rounded.copysign_(value)
        value.copy_(rounded)
    return result


def encode(x: Tensor, spec: FloatSpec) -> Tensor:
    """Return the codes of the nearest values of a format; see :func:`round_to`.

    Args:
        x: Values of any floating-point dtype and shape.
        spec: The format.

    Returns:
        uint8 codes ``sign | exponent | mantissa``, one a byte, shape of ``x``. NaN gives the NaN
        of the format.

    Raises:
        NumericsError: If ``x`` is not floating-point, or holds NaN and the format has none.
    """
    value = _working_copy(x)
    is_nan = value.isnan()
    if spec.nan_code is None and bool(is_nan.any()):
        raise NumericsError(f"{spec} has no NaN, but the values to encode hold NaN.")
    codes = torch.empty(value.shape, dtype=torch.uint8, device=value.device)
    flat, out, scratch = value.view(-1), codes.view(-1), Scratch(x.device)
    for part in chunks(flat.numel(), 1, x.device):
        encode_into(out[part], flat[part], spec, scratch)
    return codes if spec.nan_code is None else codes.masked_fill_(is_nan, spec.nan_code)


def decode(codes: Tensor, spec: FloatSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of codes.

    Args:
        codes: uint8, one code a byte, any shape; bits above those of the format are ignored.
        spec: The format.
        dtype: Of the result; values that it cannot hold are rounded.

    Returns:
        The values, shape of ``codes``.
    """
    table, flat = _value_table(spec, dtype, codes.device), codes.reshape(-1)
    values = torch.empty(flat.shape, dtype=dtype, device=codes.device)
    scratch = Scratch(codes.device)
    for part in chunks(flat.numel(), 1, codes.device):
        index = scratch.take("index", flat[part].shape, torch.int32).copy_(flat[part])
        torch.index_select(table, 0, index, out=values[part])
    return values.view(codes.shape)


def round_into(out: Tensor, value: Tensor, spec: FloatSpec, scratch: Scratch) -> None:
    """Write the rounded values to ``out``, as :func:`round_to` but with zeros that lose their sign.

    Args:
        out: fp32 or fp64, contiguous; not ``value``.
        value: Of the dtype and shape of ``out``.
        spec: A format with zero.
        scratch: Memory of the device of ``value``.
    """
    _saturate(value, spec, out)
    power = _power(_exponent(out, spec, scratch), value.dtype, scratch)
    magic = _magic(value.dtype, spec)
    out.add_(power, alpha=magic).sub_(power, alpha=magic)


def encode_into(out: Tensor, value: Tensor, spec: FloatSpec, scratch: Scratch) -> None:
    """Write the codes of values to ``out``, and use up ``value``.

    Args:
        out: uint8, shape of ``value``.
        value: fp32 or fp64, contiguous; what NaN gives is not defined.
        spec: The format.
        scratch: Memory of the device of ``value``.
    """
    if not spec.zero:
        out.copy_(_encode_power(value, spec))
        return
    _saturate(value, spec, value)
    exponent = _exponent(value, spec, scratch)
    power = _power(exponent, value.dtype, scratch)
    bits = value.add_(power, alpha=_magic(value.dtype, spec)).view(_INTEGER[value.dtype])
    steps = scratch.take("steps", value.shape, torch.int8).copy_(bits).abs_()
    exponent.sub_((spec.min_exponent + _BF16_BIAS) << _BF16_BITS)
    exponent.bitwise_right_shift_(_BF16_BITS - spec.mantissa_bits)
    if spec.signed:
        sign = scratch.take("bf16", value.shape, torch.int16)
        sign.bitwise_right_shift_(15 - spec.magnitude_bits)
        exponent.bitwise_or_(sign.bitwise_and_(1 << spec.magnitude_bits))
    out.copy_(exponent).add_(steps.view(torch.uint8))


def _saturate(value: Tensor, spec: FloatSpec, out: Tensor) -> None:
    torch.clamp(value, -spec.max if spec.signed else 0.0, spec.max, out=out)


def _exponent(value: Tensor, spec: FloatSpec, scratch: Scratch) -> Tensor:
    """Return the exponents as bfloat16 bits, int16, held at the smallest one of the format."""
    bits = scratch.take("bf16", value.shape, torch.bfloat16).copy_(value).view(torch.int16)
    exponent = scratch.take("exponent", value.shape, torch.int16)
    torch.bitwise_and(bits, 0x7F80, out=exponent)
    return exponent.clamp_(min=(spec.min_exponent + _BF16_BIAS) << _BF16_BITS)


def _power(exponent: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Return ``2**e`` for exponents in the form of :func:`_exponent`."""
    return scratch.take("power", exponent.shape, dtype).copy_(exponent.view(torch.bfloat16))


def _magic(dtype: torch.dtype, spec: FloatSpec) -> float:
    """Return ``c / 2**e``."""
    return 1.5 * 2.0 ** (_SIGNIFICAND_BITS[dtype] - spec.mantissa_bits)


def _encode_power(value: Tensor, spec: FloatSpec) -> Tensor:
    """Return the codes of the nearest powers of two; on the bits, since 2**-127 is subnormal."""
    width = _SIGNIFICAND_BITS[value.dtype]
    offset = _EXPONENT_BIAS[value.dtype] - spec.bias
    bits = value.view(_INTEGER[value.dtype]).clamp(min=0)
    half = 1 << (width - 1)
    codes = ((bits + half) >> width).sub_(offset).clamp_(0, spec.max_code)
    if offset == 0:
        codes.masked_fill_(bits < half + (half >> 1), 0)
    return codes.to(torch.uint8)


@lru_cache(maxsize=64)
def _value_table(spec: FloatSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    return value_table(spec).to(dtype).to(device)


def value_table(spec: FloatSpec) -> Tensor:
    """Return the fp32 value of every byte; bits above those of the format do not count."""
    table = torch.tensor(spec.values * (256 // spec.code_count), dtype=torch.float32)
    if not spec.zero:
        # 2**-127 is subnormal, so that a flush-to-zero mode turns the number into 0.
        table.view(torch.int32)[0] = 1 << 22
    return table


def _working_copy(x: Tensor) -> Tensor:
    """Return a contiguous fp32 or fp64 tensor that may be overwritten."""
    if not x.is_floating_point():
        raise NumericsError(f"only floating-point values can be rounded, not {x.dtype}.")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
