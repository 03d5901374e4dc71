"""Quantized linear layers by torch's fp32 product, with weights of one byte: for no native library.

Where the values of a format are integers times a power of two, a weight is kept as its integer,
int8, and what its block multiplies with in fp32. Each call expands some rows at a time to fp32, in
memory that stays in the cache, which is one conversion and one product a weight; the reference
looks up four bits for each. The values are the same, and so are the products and sums that
:mod:`fpcompiler.runtime.reference` makes of them: the result is the reference's bit for bit, for
any activations and scales.

4096 x 4096, w4a6, one thread of a Zen 4 (*measured*): 0.33 of the reference's time with one row,
0.59 with 16 and 0.96 with 512. A copy in bf16 would take 0.89, 0.94 and 0.95 of that and twice the
memory, one in fp32 0.87, 0.95 and 0.95 and four times the memory. Products in bf16 take 0.4 of the
time with 512 rows, but torch returns them in bf16 on the CPU, rounded before the scales of rows and
the bias.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.numerics import decode
from fpcompiler.operand import Operand
from fpcompiler.runtime import fused, reference
from fpcompiler.runtime.arithmetic import integers_of
from fpcompiler.runtime.ops import LinearArguments

_LOG: Final = logging.getLogger("fpcompiler.runtime")
_SMALLEST_NORMAL: Final = torch.finfo(torch.float32).tiny


def fits(w_operand: Operand) -> bool:
    """Return whether weights of this kind can be expanded: integers of eight bits."""
    return integers_of(w_operand.format) is not None


@lru_cache(maxsize=1)
def announce() -> None:
    """Say how layers run where there is no native library: once, since the result is kept."""
    _LOG.warning(
        "No native library: weights are expanded to one byte each. Layers of integer formats "
        "without scales of blocks run on oneDNN's int8 product, others on fp32 products, much "
        "slower."
    )


class ExpandedLinear:
    """A layer whose weights are int8, with the scales of blocks in fp32.

    Args:
        w: ``[packed [N, bytes], *scales]``, as :func:`fpcompiler.runtime.reference.linear` takes
            them.
        bias: ``[N]``, or None.
        x_operand: What activations are; None if they are not quantized.
        w_operand: What ``w`` is.
        k: Length of a row.
    """

    def __init__(
        self,
        w: Sequence[Tensor],
        bias: Tensor | None,
        x_operand: Operand | None,
        w_operand: Operand,
        k: int,
    ) -> None:
        unit = w_operand.format.smallest
        plain = Operand(w_operand.format)
        self._integers = torch.empty(w[0].shape[0], k, dtype=torch.int8)
        for rows, values, _ in reference.weight_chunks(w[:1], plain, k):
            self._integers[rows] = values.mul_(1 / unit)
        self._block = w_operand.block.block if w_operand.block else k
        self._factors = _block_scales(w, w_operand).mul_(unit)
        self._scale = w[1].reshape(1, -1) if w_operand.outer else None
        self._bias, self._operand = bias, x_operand

    def is_exact(self) -> bool:
        """Return whether no value depends on how the processor treats subnormal numbers."""
        return bool((self._factors >= _SMALLEST_NORMAL).all())

    def __call__(self, x: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return what :func:`fpcompiler.runtime.reference.linear` does, ``[..., N]``."""
        n, k = self._integers.shape
        return reference.multiply(x, self._operand, self._chunks(), self._bias, (n, k), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights with all scales."""
        scale = 0 if self._scale is None else self._scale.nbytes
        return self._integers.nbytes + self._factors.nbytes + scale

    def _chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        n, k = self._integers.shape
        step = reference.chunk_rows(n, k)
        memory, whole = torch.empty(step, k), k // self._block
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            values, factors = memory[: rows.stop - start], self._factors[rows]
            values.copy_(self._integers[rows])
            blocks = values[:, : whole * self._block].view(len(values), whole, self._block)
            blocks.mul_(factors[:, :whole, None])
            values[:, whole * self._block :].mul_(factors[:, whole:])
            yield rows, values, _own(self._scale, rows)


def _block_scales(w: Sequence[Tensor], operand: Operand) -> Tensor:
    """Return what each block multiplies with, fp32 ``[N, blocks]``; 1 if there are no blocks."""
    if operand.block is None:
        return torch.ones(w[0].shape[0], 1)
    spec = operand.block.spec
    return w[-1].clone() if spec is None else decode(w[-1], spec)


def _own(scale: Tensor | None, rows: slice) -> Tensor | None:
    """Return the outer scales of some rows; that of a tensor belongs to all."""
    return scale if scale is None or scale.shape[1] == 1 else scale[:, rows]


@dataclass(frozen=True, eq=False)
class ExpandedLayer:
    """A layer; called with the arguments of ``fpc.linear``.

    Attributes:
        linear: The layer with expanded weights.
        reference: The operator, which torch.compile traces.
    """

    linear: ExpandedLinear
    reference: Callable[..., Any]

    def __call__(self, *args: Any) -> Tensor:
        """Return what the operator returns."""
        if torch.compiler.is_compiling():
            return self.reference(*args)  # type: ignore[no-any-return]
        given = LinearArguments(*args)
        y = fused.activate(self.linear(given.x, given.dtype), given.activation)
        return fused.add_residual(y, given.residual, given.layer)


__all__ = ["ExpandedLayer", "ExpandedLinear", "announce", "fits"]
