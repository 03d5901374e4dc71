"""From a lowered program to what the runtime executes."""

from fpcompiler.codegen.emit_plan import emit_plan

__all__ = ["emit_plan"]
