"""Linear layers on a GPU: weights packed once as kernels read them, and calls of the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.artifact.kernels import DECODE_ROWS, QUANTIZED_USES, Instance
from fpcompiler.errors import ArtifactError, NumericsError, describe_layer
from fpcompiler.formats import FORMATS
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda.flags import Flags
from fpcompiler.runtime.cuda.form import (
    CudaInput,
    InputKind,
    at_boundary,
    check_held,
    code_table,
    factor_of,
    held_in,
    input_of_codes,
    input_of_values,
)
from fpcompiler.runtime.cuda.fragments import Mode, fragment_weights
from fpcompiler.runtime.cuda.pairs import WHOLE_ROWS, Quantizing
from fpcompiler.runtime.cuda.stored import STORED
from fpcompiler.runtime.cuda.weights import KernelWeights, tiled_weights
from fpcompiler.runtime.fused import ACTIVATIONS, add_residual, check_residual
from fpcompiler.runtime.ops import LinearArguments

_OUTPUTS: Final = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_MODES: Final = {mode.value: mode for mode in Mode}
_NO_SCALES: Final = "none"
_PLAIN: Final = "none"
_OUTPUT_BYTES: Final = 16  # N is padded so that rows of D are whole runs of so many bytes.


@dataclass(frozen=True)
class Gemm:
    """A compiled GEMM that is loaded.

    Attributes:
        library: Its number for ``torch.ops.fpc_cuda``.
        a: Element format of activations.
        b: Element format of weights.
        scale: The block scales of both, such as ``block32:f8E8M0FNU``, or ``none``; those of
            weights alone if there is a mode.
        output: The type of its result.
        activation: The function of its result; ``none`` without.
        mode: How weights that stay packed are multiplied; None for CUTLASS's kernels.
        residual: Whether it always adds a tensor to its result.
        quantizing: What it makes of its result in place of giving it; None: it gives it.
    """

    library: int
    a: str
    b: str
    scale: str
    output: torch.dtype
    activation: str
    mode: Mode | None = None
    residual: bool = False
    quantizing: Quantizing | None = None

    @property
    def takes_residual(self) -> bool:
        """Whether it can add a tensor; kernels of packed weights all do where there is one."""
        return self.residual or self.mode is not None

    @classmethod
    def of(cls, instance: Instance, library: int) -> Gemm:
        """Return what the index of an artifact says of a GEMM.

        Raises:
            ArtifactError: If it is no GEMM that this version runs.
        """
        problem = instance.problem
        a, b, scale = (problem.get(name) for name in ("a", "b", "scale"))
        output = _OUTPUTS.get(str(problem.get("output")))
        activation = str(problem.get("activation"))
        mode = _MODES.get(str(problem.get("mode", "")))
        known = a in (*FORMATS, *STORED) and b in FORMATS and isinstance(scale, str)
        known = known and ("mode" not in problem or (mode is not None and a == mode.element))
        residual = problem.get("residual")
        runs = type(residual) is bool and activation in (_PLAIN, *ACTIVATIONS)
        runs = runs and not (residual and mode is not None)
        quantizing = _quantizing(problem.get("quantized"))
        if instance.role != "gemm" or not known or output is None or not runs:
            raise ArtifactError(
                f"the kernel {instance.name} of the artifact is none that this version runs; "
                "compile the model again."
            )
        return cls(
            library, str(a), str(b), str(scale), output, activation, mode, residual is True,
            quantizing,
        )  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Where layers run.

    Attributes:
        device: The GPU.
        sms: How many multiprocessors it has.
    """

    device: torch.device
    sms: int

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """Return what a CUDA device is."""
        return cls(device, torch.cuda.get_device_properties(device).multi_processor_count)


class CudaLinear:
    """A layer whose weights are packed as its kernels read them.

    Args:
        gemms: Kernels for few rows (``decode``) and for many (``prefill``).
        machine: Where it runs.
        w: ``[packed [N, bytes], *scales]``, as :func:`fpcompiler.runtime.reference.linear` takes
            them, on any device.
        bias: ``[N]``, or None.
        x_operand: How activations are quantized; None for plain ones.
        w_operand: What ``w`` is.
        k: Length of a row.
        dtype: Of the results.
        layer: For messages.
        activation: The function of the results; empty for none.

    Raises:
        ArtifactError: If the kernels do not compute such a layer.
    """

    def __init__(
        self,
        gemms: Mapping[str, Gemm],
        machine: Machine,
        w: Sequence[Tensor],
        bias: Tensor | None,
        x_operand: Operand | None,
        w_operand: Operand,
        k: int,
        dtype: torch.dtype,
        layer: str = "",
        activation: str = "",
    ) -> None:
        self._decode, self._prefill = _pair_of(gemms, x_operand, w_operand, dtype, layer)
        if {self._decode.activation, self._prefill.activation} != {activation or _PLAIN}:
            raise _unfit(layer, f"they do not compute {activation or 'it without an activation'}")
        self.layer = layer
        self.kind = InputKind(x_operand, k, self._decode.a)
        self._quantizing = {use: gemms[use] for use in QUANTIZED_USES if use in gemms}
        for gemm in self._quantizing.values():
            if replace(gemm, library=self._decode.library, quantizing=None) != self._decode:
                raise _unfit(layer, "those that quantize its output compute something else")
        self._machine, self._dtype = machine, dtype
        parts = [part.to(machine.device) for part in w]
        self._weights = _weights_of(self._decode, parts, w_operand, k, dtype)
        self.outputs = self._weights.outputs
        self._alpha = self._weights.alpha
        self._table = None
        if x_operand is not None:
            self._alpha *= factor_of(x_operand.format, self._decode.a)
            self._table = code_table(x_operand.format, self._decode.a, machine.device)
        rows = self._weights.row
        self._row_scale = None if rows is None else self._weights.padded_rows(rows)
        self._bias = None if bias is None else self._weights.padded_rows(bias.to(machine.device))

    def prepare_codes(self, x: Sequence[Tensor]) -> CudaInput:
        """Return activations ``[codes, *scales]`` as the kernels read them."""
        return input_of_codes(self.kind, x, self._table)

    def prepare_values(self, x: Tensor) -> CudaInput:
        """Return activations that are not quantized as the kernels read them.

        Raises:
            NumericsError: If they are of a type that would be rounded.
        """
        if x.dtype != torch.bfloat16:
            raise NumericsError(
                f"{describe_layer(self.layer)}: its kernel reads bfloat16, and its input is "
                f"{x.dtype}. Run the model in bfloat16, or load it with kernels=False."
            )
        return input_of_values(self.kind, x)

    def multiply(self, x: CudaInput, residual: Tensor | None = None) -> Tensor:
        """Return ``x @ w.T + bias``, ``[..., N]``, contiguous, or its activation.

        Args:
            x: The input.
            residual: Added at the end, of the shape and type of the result; or None.

        Raises:
            NumericsError: If the input was prepared for another kind of layer, or the residual is
                of another shape or type.
        """
        self._check_kind(x)
        weights = self._weights
        gemm = self._decode if x.rows <= DECODE_ROWS else self._prefill
        y: Tensor = torch.ops.fpc_cuda.gemm(
            gemm.library, x.codes, x.block_scale, weights.codes, weights.scales, x.token_scale,
            self._row_scale, self._bias, self._added(gemm, x, residual), x.scalar, self._alpha,
            x.rows, weights.padded, self.kind.padded_k, self._machine.sms, self._dtype,
        )  # fmt: skip
        if weights.padded != self.outputs:
            y = y[:, : self.outputs].contiguous()
        y = y.view(*x.shape, self.outputs)
        return y if gemm.takes_residual else add_residual(y, residual, self.layer)

    def _check_kind(self, x: CudaInput) -> None:
        if x.kind is not self.kind and x.kind != self.kind:
            raise NumericsError(
                f"{describe_layer(self.layer)}: its input was prepared as {x.kind}, but it is "
                f"{self.kind}."
            )

    def _added(self, gemm: Gemm, x: CudaInput, residual: Tensor | None) -> Tensor | None:
        """Return what a kernel adds to its result, ``[rows, padded N]``; None for nothing.

        Where the layer's own output is asked for, a kernel that always adds something adds zeros.
        """
        n, padded = self.outputs, self._weights.padded
        if residual is None or not gemm.takes_residual:
            zeros = gemm.residual
            return x.codes.new_zeros((x.rows, padded), dtype=self._dtype) if zeros else None
        check_residual(residual, (*x.shape, n), self._dtype, self.layer)
        rows = residual.reshape(x.rows, n)
        if padded != n:
            rows = torch.nn.functional.pad(rows, (0, padded - n))
        return at_boundary(rows.contiguous())

    def quantizes(self, kind: InputKind, quantizing: Quantizing) -> bool:
        """Return whether kernels make of the output what other layers read.

        Args:
            kind: What they read.
            quantizing: The quantizer in between.
        """
        made = {gemm.quantizing for gemm in self._quantizing.values()}
        whole = self.outputs == self._weights.padded == kind.k and self.outputs % WHOLE_ROWS == 0
        same = kind.operand is not None and kind.operand == Operand.parse(quantizing.operand)
        return (
            len(self._quantizing) == len(QUANTIZED_USES)
            and made == {quantizing}
            and whole
            and same
            and kind.element == (kind.operand.format.name if kind.operand else "")
        )

    def multiply_quantized(self, x: CudaInput, kind: InputKind, status: Tensor) -> CudaInput:
        """Return the output, quantized as other layers read it.

        Args:
            x: The input.
            kind: What the other layers read; :meth:`quantizes` was true of it.
            status: int32 ``[1]``; becomes 1 if a value is NaN or infinite.

        Raises:
            NumericsError: If the input was prepared for another kind of layer.
        """
        self._check_kind(x)
        weights = self._weights
        gemm = self._quantizing[QUANTIZED_USES[x.rows > DECODE_ROWS]]
        codes, scales = torch.ops.fpc_cuda.gemm_quantize(
            gemm.library, x.codes, x.block_scale, weights.codes, weights.scales, x.token_scale,
            self._row_scale, self._bias, x.scalar, self._alpha, x.rows, weights.padded,
            self.kind.padded_k, self._machine.sms, status,
        )  # fmt: skip
        return CudaInput(kind, x.shape, x.rows, codes, scales, None, None, {})

    @property
    def nbytes(self) -> int:
        """Bytes of the weights with all scales, as the kernels read them."""
        return self._weights.nbytes


@dataclass(frozen=True, eq=False)
class CudaLayer:
    """A layer; called with the arguments of ``fpc.linear``.

    Its own weights stay where they are, so those of the call are not looked at.
    """

    linear: CudaLinear

    def __call__(self, *args: Any) -> Tensor:
        """Return what the operator returns."""
        given = LinearArguments(*args)
        return self.linear.multiply(self.ready(given.x), given.residual)

    def ready(self, x: Sequence[Any]) -> CudaInput:
        """Return an input as the kernels read it."""
        if isinstance(x[0], CudaInput):
            return x[0]
        plain = self.linear.kind.operand is None
        return self.linear.prepare_values(x[0]) if plain else self.linear.prepare_codes(x)


def input_kind(gemms: Mapping[str, Gemm], x: Operand | None, k: int) -> InputKind | None:
    """Return what a layer reads; None without kernels."""
    element = next((gemm.a for gemm in gemms.values()), None)
    return None if element is None else InputKind(x, k, element)


@dataclass(frozen=True, eq=False)
class QuantizingLayer:
    """A layer that gives its output as the layers behind it read it.

    Attributes:
        layer: The layer.
        kind: What the others read.
        flags: On the device; kernels set that of the quantizer to 1 for NaN and infinity.
        place: Which of them that is.
    """

    layer: CudaLayer
    kind: InputKind
    flags: Flags
    place: int

    def __call__(self, *args: Any) -> CudaInput:
        """Return what the quantizer of the output would return."""
        x = self.layer.ready(LinearArguments(*args).x)
        return self.layer.linear.multiply_quantized(x, self.kind, self.flags.part(self.place))


def _quantizing(problem: object) -> Quantizing | None:
    """Return what the index of an artifact says of it; anything else stays None or is unfit."""
    if not isinstance(problem, dict):
        return None
    return Quantizing(str(problem.get("operand")), str(problem.get("producer")))


def _weights_of(
    gemm: Gemm, w: Sequence[Tensor], operand: Operand, k: int, dtype: torch.dtype
) -> KernelWeights:
    if gemm.mode is not None:
        return fragment_weights(w, operand, k, gemm.mode)
    return tiled_weights(w, operand, k, gemm.b, _OUTPUT_BYTES // dtype.itemsize)


def _pair_of(
    gemms: Mapping[str, Gemm], x: Operand | None, w: Operand, dtype: torch.dtype, layer: str
) -> tuple[Gemm, Gemm]:
    """Return the kernels for few and for many rows; one can do both."""
    found = [gemms[name] for name in ("decode", "prefill") if name in gemms]
    if not found:
        raise _unfit(layer, "there is neither one for few rows nor for many")
    formats = {(gemm.a, gemm.b, gemm.scale, gemm.output, gemm.mode) for gemm in found}
    if len(formats) > 1:
        raise _unfit(layer, "those for few and for many rows read different formats")
    first = found[0]
    if first.output != dtype:
        raise _unfit(layer, f"they give {first.output}, the layer {dtype}")
    # Where bf16 is multiplied, activations have the scales of their blocks in their values.
    scaled = (w,) if first.mode is Mode.BF16 else (x, w)
    wanted = {_scale_of(operand) for operand in scaled if operand}
    if wanted != {first.scale}:
        raise _unfit(layer, f"they read the scales {first.scale} of w={w},a={x or 'none'}")
    _check_formats(first, x, w, layer)
    return first, found[-1]


def _scale_of(operand: Operand) -> str:
    block = operand.block
    return f"block{block.block}:{block.format}" if block else _NO_SCALES


def _check_formats(gemm: Gemm, x: Operand | None, w: Operand, layer: str) -> None:
    """Check that kernels read what a layer multiplies."""
    if x is None:
        if gemm.mode is not Mode.BF16:
            raise _unfit(layer, f"they read {gemm.a}, and its activations are not quantized")
    else:
        try:
            check_held(x, gemm.a)
        except NumericsError as error:
            raise _unfit(layer, f"{gemm.a} does not hold {x.format}") from error
    try:
        if gemm.mode is None:
            held_in(w.format, gemm.b)
    except NumericsError as error:
        raise _unfit(layer, f"{gemm.b} does not hold {w.format}") from error
    if gemm.mode is not None and w.format.name != gemm.b:
        raise _unfit(layer, f"they read {gemm.b}, and its weights are {w.format}")


def _unfit(layer: str, cause: str) -> ArtifactError:
    return ArtifactError(
        f"{describe_layer(layer)}: its kernels in the artifact do not compute it: {cause}. Compile "
        "the model again, or load it with kernels=False."
    )
