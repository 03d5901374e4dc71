"""Linear layers on a GPU: weights packed once as kernels read them, and calls of the kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpcompiler.artifact.kernels import DECODE_ROWS, Instance
from fpcompiler.errors import ArtifactError, NumericsError, describe_layer
from fpcompiler.formats import FORMATS
from fpcompiler.numerics.kernel_layout import aligned, kernel_codes, kernel_scales
from fpcompiler.operand import Granularity, Operand
from fpcompiler.runtime.cuda.form import (
    CudaInput,
    InputKind,
    code_table,
    held_in,
    input_of_codes,
)
from fpcompiler.runtime.fused import ACTIVATIONS

_OUTPUTS: Final = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
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
        scale: The block scales of both, such as ``block32:f8E8M0FNU``, or ``none``.
        output: The type of its result.
        activation: The function of its result; ``none`` without.
    """

    library: int
    a: str
    b: str
    scale: str
    output: torch.dtype
    activation: str

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
        known = a in FORMATS and b in FORMATS and isinstance(scale, str)
        runs = problem.get("residual") is False and activation in (_PLAIN, *ACTIVATIONS)
        if instance.role != "gemm" or not known or output is None or not runs:
            raise ArtifactError(
                f"the kernel {instance.name} of the artifact is none that this version runs; "
                "compile the model again."
            )
        return cls(library, str(a), str(b), str(scale), output, activation)


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
        x_operand: How activations are quantized.
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
        x_operand: Operand,
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
        self.outputs = w[0].shape[0]
        self.kind = InputKind(x_operand, k, self._decode.a)
        self._machine, self._dtype = machine, dtype
        alignment = _OUTPUT_BYTES // dtype.itemsize
        self._padded = aligned(self.outputs, alignment)
        parts = [part.to(machine.device) for part in w]
        held = held_in(w_operand.format, self._decode.b)
        self._codes = kernel_codes(
            parts[0], w_operand.format, k, held=held, row_alignment=alignment
        )
        block = w_operand.block
        self._scales = kernel_scales(parts[-1], block.block, k) if block else None
        x_held = held_in(x_operand.format, self._decode.a)
        self._alpha = math.prod(c.factor for c in (held, x_held) if c)
        self._row_scale = None
        if w_operand.outer and w_operand.outer.granularity is Granularity.TENSOR:
            self._alpha *= float(parts[1].view(-1)[0])  # times a power of two: exact
        elif w_operand.outer:
            self._row_scale = self._padded_rows(parts[1])
        self._bias = None if bias is None else self._padded_rows(bias.to(machine.device))
        self._table = code_table(x_operand.format, self._decode.a, machine.device)

    def prepare_codes(self, x: Sequence[Tensor]) -> CudaInput:
        """Return activations ``[codes, *scales]`` as the kernels read them."""
        return input_of_codes(self.kind, x, self._table)

    def multiply(self, x: CudaInput) -> Tensor:
        """Return ``x @ w.T + bias``, ``[..., N]``, contiguous.

        Raises:
            NumericsError: If the input was prepared for another kind of layer.
        """
        if x.kind is not self.kind and x.kind != self.kind:
            raise NumericsError(
                f"{describe_layer(self.layer)}: its input was prepared as {x.kind}, but it is "
                f"{self.kind}."
            )
        gemm = self._decode if x.rows <= DECODE_ROWS else self._prefill
        y: Tensor = torch.ops.fpc_cuda.gemm(
            gemm.library, x.codes, x.block_scale, self._codes, self._scales, x.token_scale,
            self._row_scale, self._bias, None, x.scalar, self._alpha, x.rows, self._padded,
            self.kind.padded_k, self._machine.sms, self._dtype,
        )  # fmt: skip
        if self._padded != self.outputs:
            y = y[:, : self.outputs].contiguous()
        return y.view(*x.shape, self.outputs)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights with all scales, as the kernels read them."""
        parts = (self._codes, self._scales, self._row_scale)
        return sum(part.nbytes for part in parts if part is not None)

    def _padded_rows(self, values: Tensor) -> Tensor:
        """Return a number for each row of the padded weight, fp32."""
        flat = values.detach().reshape(-1).to(torch.float32)
        return pad(flat, (0, self._padded - self.outputs)).contiguous()


@dataclass(frozen=True, eq=False)
class CudaLayer:
    """A layer; called with the arguments of ``fpc.linear``.

    Its own weights stay where they are, so those of the call are not looked at.
    """

    linear: CudaLinear

    def __call__(self, x: Sequence[Any], *rest: Any) -> Tensor:
        """Return what the operator returns."""
        prepared = x[0] if isinstance(x[0], CudaInput) else self.linear.prepare_codes(x)
        return self.linear.multiply(prepared)


def _pair_of(
    gemms: Mapping[str, Gemm], x: Operand, w: Operand, dtype: torch.dtype, layer: str
) -> tuple[Gemm, Gemm]:
    """Return the kernels for few and for many rows; one can do both."""
    found = [gemms[name] for name in ("decode", "prefill") if name in gemms]
    if not found:
        raise _unfit(layer, "there is neither one for few rows nor for many")
    formats = {(gemm.a, gemm.b, gemm.scale, gemm.output) for gemm in found}
    if len(formats) > 1:
        raise _unfit(layer, "those for few and for many rows read different formats")
    if found[0].output != dtype:
        raise _unfit(layer, f"they give {found[0].output}, the layer {dtype}")
    wanted = {f"block{b.block}:{b.format}" if b else _NO_SCALES for b in (x.block, w.block)}
    if wanted != {found[0].scale}:
        raise _unfit(layer, f"they read the scales {found[0].scale} of w={w},a={x}")
    for operand, element in ((x, found[0].a), (w, found[0].b)):
        try:
            held_in(operand.format, element)
        except NumericsError as error:
            raise _unfit(layer, f"{element} does not hold {operand.format}") from error
    return found[0], found[-1]


def _unfit(layer: str, cause: str) -> ArtifactError:
    return ArtifactError(
        f"{describe_layer(layer)}: its kernels in the artifact do not compute it: {cause}. Compile "
        "the model again, or load it with kernels=False."
    )
