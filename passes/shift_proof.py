"""The proof of ``preshift``: nothing has changed but exponents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from fpcompiler.calibration import Calibration, run_once
from fpcompiler.errors import PassError, describe_layer
from fpcompiler.ir.program import Program
from fpcompiler.numerics.powers import exact_power
from fpcompiler.passes.shift_channels import Shift

_ROWS: Final = 64
"""Rows of each input that are compared; all of the outputs are."""

_RANGE: Final = (
    "a product with a power of two is out of range. Set absorb=false, lower the limit, or leave "
    "the layer out of the scheme."
)


class Proof:
    """The inputs of layers and the outputs of a program, before and after it is rewritten.

    Both run without quantization on the first calibration batch. A value times a power of two has
    the same bits but for its exponent, and so have all that follow from it: what is compared must
    be equal bit for bit.

    Args:
        program: The program before, which is run at once.
        calibration: The data.
        shifts: What will be done.

    Raises:
        IRError: If the program cannot be executed.
    """

    def __init__(self, program: Program, calibration: Calibration, shifts: Sequence[Shift]) -> None:
        self._program = program
        self._calibration = calibration
        self._shifts = shifts
        self._inputs, self._outputs = self._run()

    def _run(self) -> tuple[list[Tensor], list[Tensor]]:
        values = [shift.quantize.operands[0] for shift in self._shifts]
        return run_once(self._calibration, self._program, values, _ROWS)

    def check(self) -> str:
        """Return what has been shown.

        Raises:
            PassError: If something differs.
        """
        inputs, outputs = self._run()
        for shift, before, after in zip(self._shifts, self._inputs, inputs, strict=True):
            power = exact_power(shift.exponents).to(before.device, before.dtype)
            self._require_equal(before * power, after, shift.group.name, "its input times 2**k")
            self._require_finite(after, shift.group.name)
        last = self._shifts[-1].group.name
        for before, after in zip(self._outputs, outputs, strict=True):
            self._require_equal(before, after, last, "the result of the model after it")
        values, results = sum(x.numel() for x in inputs), sum(y.numel() for y in outputs)
        return (
            f"{values} of {values} values of shifted inputs and {results} of {results} of the "
            "results equal bit for bit"
        )

    def _require_equal(self, before: Tensor, after: Tensor, layer: str, what: str) -> None:
        both_nan = (before != before) & (after != after)
        differing = int(((before != after) & ~both_nan).sum())
        if differing:
            raise PassError(
                f"{describe_layer(layer)}: {what} differs in {differing} of {before.numel()} values"
                f" from the program before preshift: {_RANGE}"
            )

    def _require_finite(self, value: Tensor, layer: str) -> None:
        if not bool(value.isfinite().all()):
            raise PassError(f"{describe_layer(layer)}: its input times 2**k is infinite: {_RANGE}")
