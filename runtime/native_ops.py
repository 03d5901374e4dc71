"""What runs quantized layers natively inside of ``torch.compile``: operators without any state.

The native library is called through ctypes, which torch.compile cannot look into. These operators
can be traced: each takes what the library reads as tensors, so nothing is registered, looked up or
kept. A compiled graph holds the tensors of its layers as it holds other weights, and they go when
it goes. Inputs that are ready to be multiplied travel as bytes, ``[..., bytes of a row]``: their
axes carry the sizes, the order of the bytes belongs to the library.

A layer is described by the bytes of its two structures (csrc/native.h), so what the library is told
of a layer is said in one place, :class:`fpcompiler.runtime.native.NativeLinear`. The bytes belong
to this version of the library and to this machine, as the order of the weights does; the addresses
among them are replaced at each call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fpcompiler.errors import NumericsError, describe_layer
from fpcompiler.native import Library, library
from fpcompiler.native.linear import Activations, Weights
from fpcompiler.numerics.compiled import INPUTS, NO_MEMORY
from fpcompiler.numerics.scaling import not_finite
from fpcompiler.operand import Operand
from fpcompiler.runtime import fused
from fpcompiler.runtime.aligned import ALIGNMENT, aligned_memory
from fpcompiler.runtime.native import NativeLinear, ready_residual
from fpcompiler.runtime.native_producers import describe

PREPARE: Final = "(Tensor x, Tensor about, int row_bytes, str operand, str layer) -> Tensor"
"""Values ``[..., K]``, quantized and made ready for layers of one kind."""

PREPARE_CODES: Final = (
    "(Tensor codes, Tensor[] scales, Tensor about, int row_bytes, str operand, str layer) -> Tensor"
)
"""Values that are quantized already, made ready."""

PREPARE_PRODUCED: Final = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, str producer, "
    "float eps, Tensor about, int row_bytes, str operand, str layer) -> Tensor"
)
"""A norm or an activation of values, quantized and made ready; see :mod:`~.fused`."""

MULTIPLY: Final = (
    "(Tensor prepared, Tensor about, Tensor data, Tensor scale, Tensor? bias, int outputs, "
    "ScalarType dtype, str layer, Tensor? residual=None) -> Tensor"
)
"""``x @ w.T + bias``, ``[..., outputs]``, or its activation, and a residual added to it."""


class Prepared(NamedTuple):
    """Activations that are ready, where torch.compile traces; the bytes of each row."""

    rows: Tensor


@dataclass(frozen=True, eq=False)
class TracedLinear:
    """A native layer as tensors and numbers, which is what a traced graph can hold.

    Attributes:
        about: ``FpcWeights`` and behind it ``FpcActivations``, bytes.
        data: The weights in the library's order.
        scale: Of each output, padded.
        bias: Of each output, padded; or None.
        outputs: How many there are.
        row_bytes: Bytes of a row of activations that are ready.
        operand: How activations are quantized; empty if they are not.
        layer: For messages.
    """

    about: Tensor
    data: Tensor
    scale: Tensor
    bias: Tensor | None
    outputs: int
    row_bytes: int
    operand: str
    layer: str

    @classmethod
    def of(cls, linear: NativeLinear, layer: str) -> TracedLinear:
        """Return it for a layer, with whose tensors it shares memory."""
        about = torch.frombuffer(
            bytearray(b"".join(bytes(part) for part in linear.structures)), dtype=torch.uint8
        )
        data, scale, bias = linear.tensors
        operand = linear.kind.operand
        text = "" if operand is None else str(operand)
        return cls(about, data, scale, bias, linear.outputs, linear.prepared_bytes(1), text, layer)

    def prepare(self, *args: Any) -> Prepared:
        """Return the result of a quantizer, called with its operator's arguments, for layers."""
        own = self.about, self.row_bytes, self.operand, args[-1]
        values = args[:-2]
        if len(values) == 1:
            return Prepared(torch.ops.fpc.native_prepare(*values, *own))
        return Prepared(torch.ops.fpc.native_prepare_produced(*values, *own))

    def __call__(
        self, x: Sequence[Any], dtype: torch.dtype, residual: Tensor | None = None
    ) -> Tensor:
        """Return the layer's result for values, codes and scales, or what is ready."""
        own = self.about, self.row_bytes, self.operand, self.layer
        if isinstance(x[0], Prepared):
            rows = x[0].rows
        elif self.operand:
            rows = torch.ops.fpc.native_prepare_codes(x[0], list(x[1:]), *own)
        else:
            rows = torch.ops.fpc.native_prepare(x[0], *own)
        y: Tensor = torch.ops.fpc.native_multiply(
            rows, self.about, self.data, self.scale, self.bias, self.outputs, dtype, self.layer,
            residual,
        )  # fmt: skip
        return y


class _Call(NamedTuple):
    """What an operator passes to the library beside tensors."""

    native: Library
    weights: Weights
    activations: Activations
    layer: str

    def memory(self, shape: Sequence[int], row_bytes: int) -> Tensor:
        """Return memory for rows that are made ready.

        It is zero, as some bytes of each row are padding: results depend on the arguments alone.
        """
        functions = self.native.functions
        if functions.fpc_prepared_bytes(ctypes.byref(self.weights), 1) != row_bytes:
            raise _mismatch(self.layer)
        return torch.zeros((*shape, row_bytes), dtype=torch.uint8)

    def check(self, status: int, operand: str) -> None:
        if status == NO_MEMORY:
            raise MemoryError(f"no memory for a row of {self.weights.k} values")
        if status:
            raise not_finite(Operand.parse(operand), self.layer)


def _call(about: Tensor, layer: str) -> _Call:
    native = library()
    size = ctypes.sizeof(Weights)
    if native is None or about.numel() != size + ctypes.sizeof(Activations):
        raise _mismatch(layer)
    address = about.data_ptr()
    weights = Weights.from_buffer_copy(Weights.from_address(address))
    return _Call(native, weights, Activations.from_address(address + size), layer)


def _mismatch(layer: str) -> NumericsError:
    return NumericsError(
        f"{describe_layer(layer)}: the layer was made for another native library, or its tensors "
        "were mixed up. Load the artifact again, and call torch.compile in the same process."
    )


def _prepare(x: Tensor, about: Tensor, row_bytes: int, operand: str, layer: str) -> Tensor:
    call = _call(about, layer)
    k = call.weights.k
    if x.shape[-1] != k or x.dtype not in INPUTS:
        raise _mismatch(layer)
    x = x.contiguous()
    rows = call.memory(x.shape[:-1], row_bytes)
    status = call.native.functions.fpc_prepare(
        ctypes.byref(call.weights), ctypes.byref(call.activations), x.data_ptr(), INPUTS[x.dtype],
        x.numel() // k, k, rows.data_ptr(), torch.get_num_threads(), call.native.instructions,
    )  # fmt: skip
    call.check(status, operand)
    return rows


def _prepare_codes(
    codes: Tensor,
    scales: Sequence[Tensor],
    about: Tensor,
    row_bytes: int,
    operand: str,
    layer: str,
) -> Tensor:
    call, kind = _call(about, layer), Operand.parse(operand)
    if codes.shape[-1] != call.weights.k or len(scales) != len(kind.levels):
        raise _mismatch(layer)
    codes, scales = codes.contiguous(), [scale.contiguous() for scale in scales]
    rows = call.memory(codes.shape[:-1], row_bytes)
    status = call.native.functions.fpc_prepare_codes(
        ctypes.byref(call.weights), ctypes.byref(call.activations), codes.data_ptr(),
        scales[0].data_ptr() if kind.outer else None,
        scales[-1].data_ptr() if kind.block else None,
        codes.numel() // call.weights.k, rows.data_ptr(), torch.get_num_threads(),
        call.native.instructions,
    )  # fmt: skip
    call.check(status, operand)
    return rows


def _prepare_produced(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    producer: str,
    eps: float,
    about: Tensor,
    row_bytes: int,
    operand: str,
    layer: str,
) -> Tensor:
    values = x, weight, bias, scale, shift, producer, eps
    produced = describe(*values)
    if produced is None:
        made = fused.produce(*values, layer)
        return _prepare(made, about, row_bytes, operand, layer)
    call = _call(about, layer)
    k = call.weights.k
    if x.shape[-1] != k:
        raise _mismatch(layer)
    own, stride, how, factors, terms = produced
    rows = call.memory(x.shape[:-1], row_bytes)
    status = call.native.functions.fpc_prepare_produced(
        ctypes.byref(call.weights), ctypes.byref(call.activations), how, factors, terms,
        own.data_ptr(), INPUTS[own.dtype], own.numel() // k, stride, rows.data_ptr(),
        torch.get_num_threads(), call.native.instructions,
    )  # fmt: skip
    call.check(status, operand)
    return rows


def _multiply(
    prepared: Tensor,
    about: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    outputs: int,
    dtype: torch.dtype,
    layer: str,
    residual: Tensor | None = None,
) -> Tensor:
    call = _call(about, layer)
    weights, functions = call.weights, call.native.functions
    reference = ctypes.byref(weights)
    vectors = [vector for vector in (scale, bias) if vector is not None]
    if (
        weights.n != outputs
        or dtype not in INPUTS
        or data.numel() != functions.fpc_weight_bytes(reference)
        or prepared.shape[-1] != functions.fpc_prepared_bytes(reference, 1)
        or any(vector.numel() < outputs for vector in vectors)
        or (bias is None) == bool(weights.bias)
    ):
        raise _mismatch(layer)
    prepared, data = _aligned(prepared), _aligned(data)
    weights.data, weights.row_scale = data.data_ptr(), scale.data_ptr()
    weights.bias = None if bias is None else bias.data_ptr()
    y = torch.empty((*prepared.shape[:-1], outputs), dtype=dtype)
    added = ready_residual(residual, y, layer)
    status = functions.fpc_multiply(
        reference, prepared.data_ptr(), prepared.numel() // prepared.shape[-1], y.data_ptr(),
        None if added is None else added.data_ptr(), INPUTS[dtype], outputs,
        torch.get_num_threads(), call.native.instructions,
    )  # fmt: skip
    call.check(status, "")
    return y


def _aligned(memory: Tensor) -> Tensor:
    """Return bytes where kernels may read them: a copy of a tensor may lie anywhere."""
    memory = memory.contiguous()
    if memory.data_ptr() % ALIGNMENT == 0:
        return memory
    return aligned_memory(memory.numel()).view(memory.shape).copy_(memory)


def _fake_prepare(x: Tensor, about: Tensor, row_bytes: int, operand: str, layer: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_bytes), dtype=torch.uint8)


def _fake_prepare_codes(
    codes: Tensor,
    scales: Sequence[Tensor],
    about: Tensor,
    row_bytes: int,
    operand: str,
    layer: str,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], row_bytes))


def _fake_prepare_produced(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    producer: str,
    eps: float,
    about: Tensor,
    row_bytes: int,
    operand: str,
    layer: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_bytes), dtype=torch.uint8)


def _fake_multiply(
    prepared: Tensor,
    about: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    outputs: int,
    dtype: torch.dtype,
    layer: str,
    residual: Tensor | None = None,
) -> Tensor:
    return prepared.new_empty((*prepared.shape[:-1], outputs), dtype=dtype)


for _name, _schema, _run, _fake in (
    ("fpc::native_prepare", PREPARE, _prepare, _fake_prepare),
    ("fpc::native_prepare_codes", PREPARE_CODES, _prepare_codes, _fake_prepare_codes),
    ("fpc::native_prepare_produced", PREPARE_PRODUCED, _prepare_produced, _fake_prepare_produced),
    ("fpc::native_multiply", MULTIPLY, _multiply, _fake_multiply),
):
    torch.library.define(_name, _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(_name, "cpu", _run)
    torch.library.register_fake(_name, _fake)


__all__ = ["Prepared", "TracedLinear"]
