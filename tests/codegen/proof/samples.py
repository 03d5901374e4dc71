"""What tools printed of a compiled kernel, shortened: W4A6 on sm_100a, 128x64x128."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fpcompiler.codegen.cutlass.instance import Instance
from fpcompiler.codegen.problem import Rows
from fpcompiler.codegen.proof.launch import LaunchRecord, LaunchShape
from tests.codegen.problems import W4A6, instance_of, problem

_FOLDER: Final = Path(__file__).parent / "printed"
SHAPE: Final = LaunchShape(300, 520, 640)
INSTANCE: Final[Instance] = instance_of(problem(W4A6, "sm_100a", Rows.DECODE))


def sample(kind: str) -> str:
    """Return a text: ``launch``, ``ptx``, ``sass`` or ``usage``."""
    return (_FOLDER / f"sm_100a.{kind}").read_text(encoding="utf-8")


def dsl_ptx() -> str:
    """Return PTX that CuTe DSL makes for the same instance."""
    return (_FOLDER / "dsl_sm_100a.ptx").read_text(encoding="utf-8")


def launch() -> LaunchRecord:
    """Return the recorded launch."""
    return LaunchRecord.of_output(SHAPE, sample("launch"))
