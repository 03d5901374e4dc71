"""The operators ``fpc::`` as torch records them for ONNX: five symbols, and operations of torch.

=======================  ==========================================================================
symbol                   what it stands for
=======================  ==========================================================================
``fpc::Quantize``        ``x`` -> codes, and a scale for each level, as of ``numerics.quantize``
``fpc::QuantizeWithin``  ``x, outer`` -> codes, and scales of blocks within that of the tensor
``fpc::Encode``          ``x, *scales`` -> codes
``fpc::Dequantize``      ``codes, *scales`` -> fp32 values
``fpc::Weight``          ``packed, *scales`` -> fp32 values ``[N, k]`` without outer scale, and it
=======================  ==========================================================================

The product of a layer is that of the reference (:mod:`fpcompiler.runtime.reference`): of elements
times block scales, with the outer scales behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.errors import ExportError
from fpcompiler.numerics.hadamard import sylvester
from fpcompiler.operand import Operand
from fpcompiler.runtime import fused, operators
from fpcompiler.runtime.ops import LinearArguments, scale_shape
from fpcompiler.runtime.reference import elements

__all__ = ["DOMAIN", "resolve"]

DOMAIN: Final = "fpc"
"""Of the symbols; nothing of it is left in a file."""


def resolve(op: str) -> Callable[..., Any]:
    """Return what is recorded for an operator of a plan.

    Raises:
        ExportError: If it has no form in ONNX.
        ArtifactError: If there is no such operator.
    """
    if op in _WITHOUT_FORM:
        raise ExportError(
            f"the program has the operator {op}, {_WITHOUT_FORM[op]}. Export to pt2, or compile "
            "without the method that makes it."
        )
    return _RECORDED.get(op) or operators.resolve(op)


_WITHOUT_FORM: Final[Mapping[str, str]] = MappingProxyType(
    {"fpc.fold": "which changes the codes of a weight at each call and has no form in ONNX"}
)


def _symbol(
    name: str,
    inputs: Sequence[Tensor],
    attributes: Mapping[str, Any],
    results: Sequence[tuple[torch.dtype, Sequence[Any]]],
) -> list[Tensor]:
    made: Sequence[Tensor] = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}",
        tuple(inputs),
        dict(attributes),
        dtypes=[dtype for dtype, _ in results],
        shapes=[shape for _, shape in results],
        version=1,
    )
    return list(made)


def _quantize(x: Tensor, operand: str, layer: str) -> list[Tensor]:
    results: list[tuple[torch.dtype, Sequence[Any]]] = [(torch.uint8, x.shape)]
    for level in Operand.parse(operand).levels:
        dtype = torch.float32 if level.is_real else torch.uint8
        results.append((dtype, scale_shape(x.shape, level)))
    attributes = {"operand": operand, "layer": layer}
    return _symbol("Quantize", [x.to(torch.float32)], attributes, results)


def _quantize_within(x: Tensor, outer: Tensor, operand: str, layer: str) -> list[Tensor]:
    level = Operand.parse(operand).levels[-1]
    results = [(torch.uint8, x.shape), (torch.uint8, scale_shape(x.shape, level))]
    attributes = {"operand": operand, "layer": layer}
    return _symbol("QuantizeWithin", [x.to(torch.float32), outer], attributes, results)


def _fused_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    producer: str,
    eps: float,
    operand: str,
    layer: str,
) -> list[Tensor]:
    values = fused.produce(x, weight, bias, scale, shift, producer, eps, layer)
    return _quantize(values, operand, layer)


def _encode(x: Tensor, scales: Sequence[Tensor], operand: str, layer: str) -> Tensor:
    attributes = {"operand": operand, "layer": layer}
    inputs = [x.to(torch.float32), *scales]
    return _symbol("Encode", inputs, attributes, [(torch.uint8, x.shape)])[0]


def _dequantize(value: Sequence[Tensor], operand: str, dtype: torch.dtype) -> Tensor:
    return _values(value, operand, "").to(dtype)


def _values(value: Sequence[Tensor], operand: str, layer: str) -> Tensor:
    attributes = {"operand": operand, "layer": layer}
    return _symbol("Dequantize", value, attributes, [(torch.float32, value[0].shape)])[0]


def _weight(value: Sequence[Tensor], operand: str, k: int, layer: str) -> list[Tensor]:
    """Return the elements times block scales, and the outer scale in a list if there is one."""
    results: list[tuple[torch.dtype, Sequence[Any]]] = [(torch.float32, (value[0].shape[0], k))]
    if Operand.parse(operand).outer:
        results.append((torch.float32, (value[1].numel(),)))
    return _symbol("Weight", value, {"operand": operand, "layer": layer, "k": k}, results)


def _linear(*args: Any) -> Tensor:
    x, w, bias, x_text, w_text, k, dtype, layer, activation, residual = LinearArguments(*args)
    weight, *factors = _weight(w, w_text, k, layer)
    if x_text:
        operand = Operand.parse(x_text)
        factors = [x[1], *factors] if operand.outer else factors
        values = _values(_inner(x, operand), str(elements(operand)), layer)
    else:
        values = x[0].to(torch.float32)
    y = values @ weight.T
    for factor in factors:
        y = y * factor
    y = fused.activate((y if bias is None else y + bias).to(dtype), activation)
    return y if residual is None else y + residual


def _inner(value: Sequence[Tensor], operand: Operand) -> list[Tensor]:
    """Return codes and block scales."""
    return [value[0], *((value[-1],) if operand.block else ())]


def _hadamard(x: Tensor, block: int) -> Tensor:
    wide = x.to(torch.float32).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    return (wide @ sylvester(block).to(torch.float32)).reshape(x.shape).to(x.dtype)


def _pack(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    count, size = _UNITS[bits]
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, -codes.shape[-1] % count))
    units = padded.reshape(*codes.shape[:-1], -1, count)
    return _digits(_number(units, bits), 8, size).to(torch.uint8)


def _unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    if bits == 8:
        return packed
    count, size = _UNITS[bits]
    units = packed.to(torch.int32).reshape(*packed.shape[:-1], -1, size)
    return _digits(_number(units, 8), bits, count)[..., :k].to(torch.uint8)


_UNITS: Final = {4: (2, 1), 6: (4, 3)}
"""Codes that are packed together, and the bytes that they take."""


def _number(digits: Tensor, bits: int) -> Tensor:
    """Return the numbers, ``[...]``, whose digits of some bits are on the last axis, lowest first.

    In sums and quotients: shifts of ONNX are for unsigned numbers, which few other operations take.
    """
    parts = digits.unbind(-1)
    return sum((part * (1 << bits * i) for i, part in enumerate(parts[1:], 1)), start=parts[0])


def _digits(numbers: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`_number`, with the digits of neighbours side by side."""
    parts = [
        torch.div(numbers, 1 << bits * i, rounding_mode="floor") % (1 << bits) for i in range(count)
    ]
    return torch.stack(parts, -1).flatten(-2)


_RECORDED: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "fpc.quantize": _quantize,
        "fpc.quantize_within": _quantize_within,
        "fpc.fused_quantize": _fused_quantize,
        "fpc.encode": _encode,
        "fpc.dequantize": _dequantize,
        "fpc.linear": _linear,
        "fpc.hadamard": _hadamard,
        "fpc.pack": _pack,
        "fpc.unpack": _unpack,
    }
)
"""What is recorded in place of each of our operators."""
