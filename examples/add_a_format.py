"""A number format of your own: one row, from which everything else follows.

    python examples/add_a_format.py

The row is E5M2 without infinities and NaN, so that all of its codes are numbers. To make it part of
fpcompiler, the row would be one more line of the table in ``fpcompiler/formats.py``; schemes, types
of the IR, packing and artifacts find it there by its name.
"""

from __future__ import annotations

import torch

from fpcompiler import numerics
from fpcompiler.formats import FORMATS, FloatSpec
from fpcompiler.operand import Operand, ScaleLevel

F8E5M2FN = FloatSpec("f8E5M2FN", exponent_bits=5, mantissa_bits=2, bias=15, source="this example")


def main() -> None:
    known = FORMATS["f8E5M2"]
    print("format     codes  largest   smallest")
    for spec in (known, F8E5M2FN):
        print(f"{spec.name:9} {spec.code_count:6} {spec.max:8g} {spec.smallest:10.3g}")

    x = torch.tensor([1.1, -57344.0, 70000.0, 1e9, 1e-6])
    print("\nvalues            ", x.tolist())
    for spec in (known, F8E5M2FN):
        print(f"rounded to {spec.name:8}", numerics.round_to(x, spec).tolist())

    codes = numerics.encode(x, F8E5M2FN)
    print("codes              ", [f"{code:#04x}" for code in codes.tolist()])
    assert torch.equal(numerics.decode(codes, F8E5M2FN), numerics.round_to(x, F8E5M2FN))

    operand = Operand(F8E5M2FN, (ScaleLevel.parse("row:f32"),))
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    value = numerics.dequantize(*numerics.quantize(weight, operand), operand)
    print(f"\na weight as {operand}: {numerics.sqnr_db(weight, value):.2f} dB")
    print(f"in the table of formats: {F8E5M2FN.name in FORMATS}")


if __name__ == "__main__":
    main()
