"""Quantized linear layers by oneDNN's int8 product, which torch brings: for no native library.

Formats whose values are integers times a power of two are expanded to one byte a value, and their
products are summed exactly, so the result is that of :mod:`fpcompiler.runtime.reference` bit for
bit wherever that is exact itself. Scales of blocks would need a product for each block: these cost
three to four bytes a weight, since oneDNN pads short rows, and gain little (*measured*: 0.6 of the
reference's time with 512 rows of 4096 x 4096), so such layers are those of
:mod:`~fpcompiler.runtime.expanded`.

The operators are private to torch. Whether they are there and exact is tried once.
"""

from __future__ import annotations

import itertools
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.operand import Operand
from fpcompiler.runtime import fused, reference
from fpcompiler.runtime.arithmetic import integers_of
from fpcompiler.runtime.ops import LinearArguments

_LOG: Final = logging.getLogger("fpcompiler.runtime")
_EXACT: Final = 1 << 24
"""fp32 holds all integers up to this."""
_PAIR: Final = (1 << 15) - 1
"""Without VNNI two products are added in 16 bits, which saturate."""
_MACHINES: Final = ("x86_64", "amd64")
"""Elsewhere oneDNN may have a slow loop only for unsigned by signed bytes."""


def fits(x_operand: Operand | None, w_operand: Operand) -> bool:
    """Return whether a layer of these operands can run here: integers, and no scales of blocks."""
    if x_operand is None or x_operand.block or w_operand.block:
        return False
    w, x = integers_of(w_operand.format), integers_of(x_operand.format)
    return w is not None and x is not None and 2 * (2 * max(x)) * max(w) <= _PAIR


@lru_cache(maxsize=1)
def product_problem() -> str | None:
    """Return why torch's int8 product cannot be used on this machine; None if it can.

    It is tried once, on bytes at the ends of their range and sums of more than 16 bits.
    """
    if platform.machine().lower() not in _MACHINES:
        return f"it is fast on x86-64 only, and this is {platform.machine()}"
    x = torch.arange(3 * 130, dtype=torch.int32).remainder(121).view(3, 130)
    w = torch.arange(70 * 130, dtype=torch.int32).remainder(25).view(70, 130) - 12
    bias = torch.arange(70, dtype=torch.float32)
    expected = (x.double() @ w.double().T + bias.double()) * 0.25
    try:
        product = _Product(w.to(torch.int8), bias * 0.25, 0.25)
        found = product(x.to(torch.uint8))
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this torch ({torch.__version__}) has none: {str(error).partition(chr(10))[0]}"
    return None if torch.equal(found.double(), expected) else "it is not exact on this machine"


@lru_cache(maxsize=1)
def usable() -> bool:
    """Return whether layers may run here, and log why not: once, since the result is kept."""
    problem = product_problem()
    if problem:
        _LOG.warning("No int8 product of oneDNN: %s. Layers run on fp32 products.", problem)
    return problem is None


class _Product:
    """``(bytes @ integers.T) * unit + bias`` in fp32, exact if its sums stay below 2**24.

    Args:
        integers: ``[N, K]``, int8.
        bias: ``[N]``, fp32.
        unit: A power of two.
    """

    def __init__(self, integers: Tensor, bias: Tensor, unit: float) -> None:
        self._weights = torch.ops.onednn.qlinear_prepack(integers, None)
        self._bias = bias
        self._unit = unit
        self._one = torch.ones(1)
        self._zero = torch.zeros(1, dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product of bytes ``[M, K]``, fp32 ``[M, N]``."""
        # Signed by signed bytes would run in a plain loop, hundreds of times slower.
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            x, self._unit, 0, self._weights, self._one, self._zero, self._bias, 1.0, 0,
            torch.float32, "none", [], "",
        )  # fmt: skip
        return result


class OneDnnLinear:
    """A layer whose weights are expanded to int8 in oneDNN's own order.

    Bytes are activations plus an offset that makes them unsigned; what that adds to a sum is
    subtracted by the bias of the product. Rows that are too long for exact sums are cut.

    Args:
        w: ``[packed [N, bytes], *scales]``, as :func:`fpcompiler.runtime.reference.linear` takes
            them.
        bias: ``[N]``, or None.
        x_operand: What activations are.
        w_operand: What ``w`` is.
        k: Length of a row.
    """

    def __init__(
        self,
        w: Sequence[Tensor],
        bias: Tensor | None,
        x_operand: Operand,
        w_operand: Operand,
        k: int,
    ) -> None:
        w_integers, x_integers = integers_of(w_operand.format), integers_of(x_operand.format)
        assert w_integers is not None
        assert x_integers is not None
        offset = max(x_integers)
        unit = w_operand.format.smallest * x_operand.format.smallest
        length = _EXACT // (2 * offset * max(w_integers))
        self._cuts = [*range(0, k, length), k]
        self._bytes = torch.tensor([value + offset for value in x_integers], dtype=torch.uint8)
        self._scaled = x_operand.outer is not None
        self._scale = w[1].reshape(1, -1) if w_operand.outer else None
        self._bias = bias
        integers = _expand(w, w_operand, k)
        self._products = [
            _Product(part, part.sum(1, dtype=torch.float32) * (-offset * unit), unit)
            for part in (integers[:, a:b].contiguous() for a, b in itertools.pairwise(self._cuts))
        ]

    def __call__(self, codes: Tensor, *scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``x @ w.T + bias``, ``[..., N]``, of quantized activations ``[..., K]``."""
        x = self._bytes.index_select(0, codes.reshape(-1).int()).view(-1, self._cuts[-1])
        y = self._sum(x)
        # In the order of the reference, which decides how it is rounded.
        if self._scaled:
            y.mul_(scales[0].reshape(-1, 1))
        if self._scale is not None:
            y.mul_(self._scale)
        if self._bias is not None:
            y.add_(self._bias)
        return y.to(dtype).view(*codes.shape[:-1], y.shape[1])

    def _sum(self, x: Tensor) -> Tensor:
        if len(self._products) == 1:
            return self._products[0](x)
        cuts = itertools.pairwise(self._cuts)
        first, *rest = (
            product(x[:, a:b].contiguous())
            for product, (a, b) in zip(self._products, cuts, strict=True)
        )
        for part in rest:
            first.add_(part)
        return first


def _expand(w: Sequence[Tensor], operand: Operand, k: int) -> Tensor:
    """Return the weights as integers, int8 ``[N, K]``, without their scales."""
    integers = torch.empty(w[0].shape[0], k, dtype=torch.int8)
    for rows, values, _ in reference.weight_chunks(w, operand, k):
        integers[rows] = values.mul_(1 / operand.format.smallest)
    return integers


@dataclass(frozen=True, eq=False)
class OneDnnLayer:
    """A layer; called with the arguments of ``fpc.linear``.

    Attributes:
        linear: The layer in oneDNN's order.
        reference: The operator, which torch.compile traces.
    """

    linear: OneDnnLinear
    reference: Callable[..., Any]

    def __call__(self, *args: Any) -> Tensor:
        """Return what the operator returns."""
        if torch.compiler.is_compiling():
            return self.reference(*args)  # type: ignore[no-any-return]
        given = LinearArguments(*args)
        y = fused.activate(self.linear(*given.x, dtype=given.dtype), given.activation)
        return fused.add_residual(y, given.residual, given.layer)


__all__ = ["OneDnnLayer", "OneDnnLinear", "fits", "product_problem", "usable"]
