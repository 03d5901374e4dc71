"""Programs as text: stable, readable, and parsable again."""

from __future__ import annotations

from fpcompiler.ir.program import Program


def print_program(program: Program, *, locations: bool = True) -> str:
    """Return the module as text, SSA values named as the nodes of the exported graph.

    The text holds no times, addresses or absolute paths, so equal programs print equally.

    Args:
        program: The program.
        locations: Whether each operation is followed by its module path and source line.
    """
    with program.context():
        text = program.module.operation.get_asm(
            use_name_loc_as_prefix=True,
            enable_debug_info=locations,
            use_local_scope=True,
        )
    return str(text)
