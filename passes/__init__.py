"""Passes: one a file, each named as in a pipeline text.

To write one, copy the smallest (``normalize.py``), give it a name, and pass it to
:func:`parse_pipeline` or :func:`run_pipeline`; ``examples/add_a_pass.py`` shows all of it.
"""

from __future__ import annotations

from fpcompiler.calibration import Calibration
from fpcompiler.ir.printer import print_program
from fpcompiler.ir.program import parse_program
from fpcompiler.ir.weights import Weights
from fpcompiler.passes.base import Pass, PassContext, StoredWeight, pass_text, rewrite
from fpcompiler.passes.dump import Dumper, weights_beside
from fpcompiler.passes.keep_if_slower import mark_rows, needs_rows
from fpcompiler.passes.manager import PassResult, run_pipeline
from fpcompiler.passes.method_advice import advice, all_kept
from fpcompiler.passes.methods import (
    METHODS,
    Method,
    default_pipeline,
    import_pipeline,
    what_learns,
)
from fpcompiler.passes.numerics import Probe
from fpcompiler.passes.pipeline import (
    PASSES,
    Pipeline,
    parse_pipeline,
    pipeline_text,
)


def opt(
    text: str,
    pipeline: str,
    weights: Weights | None = None,
    calibration: Calibration | None = None,
) -> str:
    """Run a pipeline on MLIR text, such as a dump, and return the text of the result.

    Args:
        text: A module with a function ``main``.
        pipeline: The passes, as :func:`parse_pipeline` reads them.
        weights: Values of the globals, for passes that read them.
        calibration: Inputs of the program, for passes that learn from data.

    Raises:
        IRError: If the text is not valid, or a pass needs weights that are not given.
        PassError: If the pipeline is malformed or does not fit the stage of the program.
    """
    program = parse_program(text, weights)
    run_pipeline(program, parse_pipeline(pipeline), calibration=calibration)
    return print_program(program)


__all__ = [
    "advice",
    "all_kept",
    "METHODS",
    "Method",
    "PASSES",
    "Pass",
    "PassContext",
    "PassResult",
    "Pipeline",
    "Dumper",
    "Probe",
    "StoredWeight",
    "default_pipeline",
    "import_pipeline",
    "mark_rows",
    "needs_rows",
    "opt",
    "parse_pipeline",
    "pass_text",
    "pipeline_text",
    "rewrite",
    "run_pipeline",
    "weights_beside",
    "what_learns",
]
