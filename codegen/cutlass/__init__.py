"""GEMMs from CUTLASS's templates: tiles, epilogues, sources.

``choose`` makes instances of problems, ``emit`` their sources; ``GemmLibrary`` opens what
:mod:`fpcompiler.codegen.build` compiled of them.
"""

from fpcompiler.codegen.cutlass.emit import describe, emit
from fpcompiler.codegen.cutlass.instance import Instance, Tile, choose
from fpcompiler.codegen.cutlass.library import GemmLibrary

__all__ = ["choose", "emit", "describe", "Instance", "Tile", "GemmLibrary"]
