"""GEMMs from CUTLASS's templates: tiles, epilogues, sources.

``choose`` makes instances of problems, ``emit`` their sources; ``GemmLibrary`` opens what
:mod:`fpcompiler.codegen.build` compiled of them. ``describe`` and ``parse_instance`` keep an
instance in a file, from which its kernel can be made again.
"""

from fpcompiler.codegen.cutlass.emit import emit
from fpcompiler.codegen.cutlass.instance import Instance, Tile, choose
from fpcompiler.codegen.cutlass.library import GemmLibrary
from fpcompiler.codegen.cutlass.package import find_cutlass
from fpcompiler.codegen.cutlass.record import describe, parse_instance

__all__ = [
    "choose", "emit", "describe", "parse_instance", "Instance", "Tile", "GemmLibrary",
    "find_cutlass",
]  # fmt: skip
