"""The intermediate representation: MLIR's torch dialect plus our ``fpq`` dialect.

Nothing outside this package and ``passes/`` touches the MLIR bindings.
"""

from fpcompiler.ir.context import require_torch_mlir

require_torch_mlir()

from fpcompiler.ir.importer import import_program  # noqa: E402
from fpcompiler.ir.printer import print_program  # noqa: E402
from fpcompiler.ir.program import Program, Stage, parse_program  # noqa: E402
from fpcompiler.ir.raise_to_fx import raise_to_fx  # noqa: E402
from fpcompiler.ir.weights import Weights  # noqa: E402

__all__ = [
    "Program",
    "Stage",
    "Weights",
    "import_program",
    "parse_program",
    "print_program",
    "raise_to_fx",
]
