"""Quantized linear layers by the native library: packed weights, decoded in registers.

E2M1, E2M3, INT8 and their like are integers times a power of two, so their products are summed
exactly in int8 arithmetic. Other formats are summed in bf16 or fp32 arithmetic, each value being
held exactly. Codes of four bits stay as they are; those of six and eight bits take a byte.
The definition of the result is :mod:`fpcompiler.runtime.reference`: with scales of rows and tokens
only, integer sums give it bit for bit; otherwise the order of the additions differs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.native import library
from fpcompiler.native.linear import Activations, Arithmetic, Weights
from fpcompiler.numerics import quantize
from fpcompiler.numerics.compiled import BLOCK_SCALES, INPUTS, NO_MEMORY, operand_struct
from fpcompiler.numerics.scaling import not_finite
from fpcompiler.operand import Operand
from fpcompiler.runtime.aligned import ALIGNMENT, aligned_memory
from fpcompiler.runtime.arithmetic import arithmetic_for, integers_of, takes
from fpcompiler.runtime.fused import check_residual
from fpcompiler.runtime.native_producers import Produced, activation_code

_OUTPUTS: Final = 64  # of a block of weights
_POWERS: Final = "f8E8M0FNU"
_E8M0_BIAS: Final = 127


@dataclass(frozen=True)
class InputKind:
    """What activations must agree in so that several layers can share them once prepared.

    Attributes:
        operand: How they are quantized; None if they are not.
        k: Length of a row.
        group: Values that share scales in the sum; 0 if there are no scales of blocks.
        arithmetic: How they are summed.
        offset: What the weights' integers are shifted by.
    """

    operand: Operand | None
    k: int
    group: int
    arithmetic: Arithmetic
    offset: int


class PreparedInput(NamedTuple):
    """Activations in the form in which they are multiplied.

    Attributes:
        kind: What they are.
        shape: Their shape without the last axis.
        rows: Product of that shape.
        memory: Holds the bytes.
        address: Of the first byte, which is aligned.
    """

    kind: InputKind
    shape: tuple[int, ...]
    rows: int
    memory: Tensor
    address: int


class NativeLinear:
    """A layer whose weights are in the library's own order.

    Args:
        w: ``[packed [N, bytes], *scales]``, as :func:`fpcompiler.runtime.reference.linear` takes
            them.
        bias: ``[N]``, or None.
        x_operand: How activations are quantized; None if they are not.
        w_operand: What ``w`` is.
        k: Length of a row.
        dtype: Of the activations.
        layer: For messages.
        instructions: What to use of the processor; by default all that it has.
        activation: What is computed of the results, one of ``fused.ACTIVATIONS``; empty: nothing.

    Raises:
        NumericsError: If there is no native library, or it does not take such weights.
    """

    def __init__(
        self,
        w: Sequence[Tensor],
        bias: Tensor | None,
        x_operand: Operand | None,
        w_operand: Operand,
        k: int,
        dtype: torch.dtype = torch.float32,
        layer: str = "",
        instructions: int | None = None,
        activation: str = "",
    ) -> None:
        native = library()
        n = w[0].shape[0]
        if native is None or not takes(w_operand, n, k):
            reason = "there is no native library" if native is None else f"it takes no {w_operand}"
            raise NumericsError(f"{describe_layer(layer)}: cannot run natively: {reason}.")
        self._native = native
        self._layer = layer
        self._instructions = native.instructions if instructions is None else instructions
        self.outputs = n
        arithmetic = arithmetic_for(x_operand, w_operand, k, dtype, self._instructions)
        group = _group(x_operand, w_operand, arithmetic)
        self._integers = integers_of(w_operand.format) if arithmetic is Arithmetic.INT8 else None
        offset = max(self._integers) if self._integers else 0
        self.kind = InputKind(x_operand, k, group, arithmetic, offset)
        self._scale = _outputs_padded(w[1] if w_operand.outer else torch.ones(1), n)
        self._bias = None if bias is None else _outputs_padded(bias, n)
        self._struct = self._describe(x_operand, w_operand, n, _exponents(w, w_operand))
        self._data = self._repack(w, w_operand)
        self._struct.data = self._data.data_ptr()
        self._struct.activation = activation_code(activation)
        self._weights = ctypes.byref(self._struct)
        self._activations = ctypes.byref(_activations(x_operand, arithmetic))
        # Looking functions up takes longer than a small layer.
        self._prepare = native.functions.fpc_prepare
        self._prepare_produced = native.functions.fpc_prepare_produced
        self._multiply = native.functions.fpc_multiply

    def prepare(self, x: Tensor, layer: str = "") -> PreparedInput:
        """Quantize activations ``[..., K]``, as ``fpc.quantize`` does, and make them ready.

        Args:
            x: The values.
            layer: For messages, if it is not this one.

        Raises:
            NumericsError: If a value is NaN or infinite.
        """
        k, layer = self.kind.k, layer or self._layer
        if x.dtype not in INPUTS:
            return self.prepare_codes(*_quantized(x, self.kind.operand, layer))
        x = x.contiguous()
        count = x.numel() // k
        memory, address = self._memory(count)
        status = self._prepare(
            self._weights, self._activations, x.data_ptr(), INPUTS[x.dtype], count, k, address,
            torch.get_num_threads(), self._instructions,
        )  # fmt: skip
        if status:
            raise self._error(status, layer)
        return PreparedInput(self.kind, x.shape[:-1], count, memory, address)

    def prepare_produced(self, values: Produced, layer: str = "") -> PreparedInput:
        """Compute activations, quantize them and make them ready, one row after the other.

        Args:
            values: What :func:`fpcompiler.runtime.native_producers.describe` returned.
            layer: For messages, if it is not this one.

        Raises:
            NumericsError: If a value is NaN or infinite.
        """
        x, stride, producer, scale, shift = values
        count = x.numel() // self.kind.k
        memory, address = self._memory(count)
        status = self._prepare_produced(
            self._weights, self._activations, producer, scale, shift, x.data_ptr(), INPUTS[x.dtype],
            count, stride, address, torch.get_num_threads(), self._instructions,
        )  # fmt: skip
        if status:
            raise self._error(status, layer or self._layer)
        return PreparedInput(self.kind, x.shape[:-1], count, memory, address)

    def prepare_codes(self, codes: Tensor, *scales: Tensor) -> PreparedInput:
        """Make activations ready that are quantized: ``codes [..., K]`` and their scales."""
        operand = self.kind.operand
        assert operand is not None
        count = codes.numel() // self.kind.k
        memory, address = self._memory(count)
        codes, scales = codes.contiguous(), tuple(scale.contiguous() for scale in scales)
        status = self._native.functions.fpc_prepare_codes(
            self._weights, self._activations, codes.data_ptr(),
            scales[0].data_ptr() if operand.outer else None,
            scales[-1].data_ptr() if operand.block else None,
            count, address, torch.get_num_threads(), self._instructions,
        )  # fmt: skip
        if status:
            raise self._error(status, self._layer)
        return PreparedInput(self.kind, codes.shape[:-1], count, memory, address)

    def multiply(
        self, x: PreparedInput, dtype: torch.dtype, residual: Tensor | None = None
    ) -> Tensor:
        """Return ``x @ w.T + bias``, ``[..., N]``, or its activation, in fp32, bf16 or fp16.

        Args:
            x: The input.
            dtype: Of the result.
            residual: Added at the end, of the shape and type of the result; or None.

        Raises:
            NumericsError: If the input was prepared for another kind of layer, or the residual is
                of another shape or type.
        """
        if x.kind is not self.kind and x.kind != self.kind:
            raise NumericsError(
                f"{describe_layer(self._layer)}: its input was prepared as {x.kind}, but it is "
                f"{self.kind}."
            )
        y = torch.empty((*x.shape, self.outputs), dtype=dtype)
        added = ready_residual(residual, y, self._layer)
        status = self._multiply(
            self._weights, x.address, x.rows, y.data_ptr(),
            None if added is None else added.data_ptr(), INPUTS[dtype], self.outputs,
            torch.get_num_threads(), self._instructions,
        )  # fmt: skip
        if status:
            raise self._error(status, self._layer)
        return y

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Quantize ``x`` and multiply."""
        return self.multiply(self.prepare(x), dtype)

    @property
    def structures(self) -> tuple[Weights, Activations]:
        """What the library is told of the layer; they live as long as it does."""
        return self._struct, _activations(self.kind.operand, self.kind.arithmetic)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The weights in the library's order, and the scale and the bias of each output, padded."""
        return self._data, self._scale, self._bias

    @property
    def nbytes(self) -> int:
        """Bytes of the weights with all scales, in the library's order."""
        return int(self._data.nbytes + self._scale.nbytes)

    def _describe(
        self, x_operand: Operand | None, w_operand: Operand, n: int, exponents: tuple[int, int]
    ) -> Weights:
        kind, spec = self.kind, w_operand.format
        block = w_operand.block
        x_integers = integers_of(x_operand.format) if x_operand else None
        unit, most_input = 1.0, 0
        if self._integers:
            assert x_integers is not None
            assert x_operand is not None
            unit, most_input = spec.smallest * x_operand.format.smallest, max(x_integers)
        halves = torch.tensor(spec.values).bfloat16().view(torch.int16).tolist()
        integers = [value + kind.offset for value in self._integers or ()]
        return Weights(
            n=n,
            k=kind.k,
            group=kind.group,
            block_scale=BLOCK_SCALES[block.format] if block else -1,
            scaled_inputs=_scales_of(x_operand),
            least=exponents[0],
            most=exponents[1],
            arithmetic=kind.arithmetic,
            code_bits=spec.storage_bits,
            digits=spec.mantissa_bits + 1,
            offset=kind.offset,
            most_input=most_input,
            unit=unit,
            integers=(ctypes.c_uint8 * 256)(*integers),
            halves=(ctypes.c_uint16 * 256)(*(half & 0xFFFF for half in halves)),
            values=(ctypes.c_float * 256)(*spec.values),
            row_scale=self._scale.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
        )

    def _repack(self, w: Sequence[Tensor], w_operand: Operand) -> Tensor:
        functions, weights = self._native.functions, ctypes.byref(self._struct)
        data = aligned_memory(functions.fpc_weight_bytes(weights))
        packed = w[0].contiguous()
        block = w_operand.block
        scales = w[-1].contiguous() if block else None
        functions.fpc_repack(
            weights, packed.data_ptr(), packed.shape[1],
            None if scales is None else scales.data_ptr(),
            block.block // self.kind.group if block else 1,
            data.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return data

    def prepared_bytes(self, rows: int) -> int:
        """Return the bytes of prepared activations."""
        return int(self._native.functions.fpc_prepared_bytes(self._weights, rows))

    def _memory(self, rows: int) -> tuple[Tensor, int]:
        size = self.prepared_bytes(rows)
        memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        address = memory.data_ptr()
        return memory, address + -address % ALIGNMENT

    def _error(self, status: int, layer: str) -> Exception:
        if status == NO_MEMORY:
            return MemoryError(f"no memory for a row of {self.kind.k} values")
        assert self.kind.operand is not None
        return not_finite(self.kind.operand, layer)


def ready_residual(residual: Tensor | None, y: Tensor, layer: str) -> Tensor | None:
    """Return what is added to ``y`` as the library reads it, without gaps.

    Raises:
        NumericsError: If it is of another shape or type.
    """
    if residual is None:
        return None
    check_residual(residual, y.shape, y.dtype, layer)
    return residual.contiguous()


def _group(x: Operand | None, w: Operand, arithmetic: Arithmetic) -> int:
    """Return the values that share scales in the sum: the shorter of the two kinds of blocks."""
    sizes = [w.block.block] if w.block else []
    if x is not None and x.block and arithmetic is Arithmetic.INT8:
        sizes.append(x.block.block)
    return min(sizes, default=0)


def _scales_of(x: Operand | None) -> int:
    """Return the ``FpcScales`` of activations."""
    if x is None or x.block is None:
        return 0
    return 2 if x.block.format == _POWERS else 1


def _exponents(w: Sequence[Tensor], operand: Operand) -> tuple[int, int]:
    """Return the least and the largest exponent of the scales of blocks, 0 if they are others."""
    if operand.block is None or operand.block.format != _POWERS:
        return 0, 0
    least, most = w[-1].aminmax()
    return int(least) - _E8M0_BIAS, int(most) - _E8M0_BIAS


def _outputs_padded(values: Tensor, n: int) -> Tensor:
    padded = torch.zeros(-(-n // _OUTPUTS) * _OUTPUTS)
    padded[:n] = values.detach().reshape(-1).to(torch.float32)
    return padded


def _quantized(x: Tensor, operand: Operand | None, layer: str) -> tuple[Tensor, ...]:
    if operand is None:
        raise NumericsError(f"{describe_layer(layer)}: {x.dtype} activations do not run natively.")
    codes, scales = quantize(x, operand, layer=layer)
    return codes, *scales


@lru_cache(maxsize=256)
def _activations(operand: Operand | None, arithmetic: Arithmetic) -> Activations:
    """Return the structure, one for each operand, which lives as long as the program."""
    if operand is None:
        return Activations(quantized=0)
    spec = operand.format
    result = Activations(operand=operand_struct(operand, spec.storage_bits), quantized=1)
    result.values[: spec.code_count] = [v if math.isfinite(v) else 0.0 for v in spec.values]
    integers = integers_of(spec)
    if arithmetic is Arithmetic.INT8:
        assert integers is not None
        result.integers[: spec.code_count] = list(integers)
    return result


__all__ = ["InputKind", "NativeLinear", "PreparedInput", "ready_residual"]
