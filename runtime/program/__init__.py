"""Programs: a plan for inputs of given sizes, run by the native library without Python in between.

The first call with some sizes runs step by step; the second one is recorded, and from the third on
its steps are operations on memory that is laid out beforehand. Both ways call the same kernels.
"""

from fpcompiler.runtime.program.cache import ProgramCache
from fpcompiler.runtime.program.run import ChangedError, Program

__all__ = ["ChangedError", "Program", "ProgramCache"]
