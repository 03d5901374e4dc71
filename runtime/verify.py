"""Verifies an artifact: its file, its plan against its tensors, and its recorded calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fpcompiler.artifact import Artifact, Golden, check, read
from fpcompiler.errors import FpcompilerError
from fpcompiler.runtime.compare import Distance
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.tables import VerifyReport, VerifyRow

GOLDEN_DB: Final = 40.0
"""Least SQNR of a replayed output.

Bits are reported but not required: another BLAS or another number of threads adds in another
order, an activation close to the middle between two codes may then round to the other one, and the
difference of that one code goes through all layers after it. A wrong weight, scale or kernel is
far below 40 dB.
"""


def verify(artifact: Artifact, executor: Executor, source: Path | None) -> VerifyReport:
    """Make every check and return the results; a failed check raises nothing.

    Args:
        artifact: What was loaded or compiled.
        executor: Runs it; replays happen from the initial state, with a state of their own.
        source: The file it was loaded from, which is read again; None if it is in memory only.
    """
    rows = [_file(source)] if source else []
    rows.append(_plan(artifact))
    rows.extend(_replay(artifact.golden, executor.fresh()))
    return VerifyReport(tuple(rows))


def _row(check: str, good: bool, detail: str) -> VerifyRow:
    return VerifyRow(check, "ok" if good else "failed", detail)


def _file(source: Path) -> VerifyRow:
    try:
        read(source)
    except FpcompilerError as error:
        return _row("file", False, str(error))
    return _row("file", True, f"{source.stat().st_size:,} bytes, all checksums agree")


def _plan(artifact: Artifact) -> VerifyRow:
    problems = check(artifact.plan, artifact.tensors)
    steps = [step for step in artifact.plan.steps if step.op == "fpc.linear"]
    good = f"{len(steps)} quantized products, {len(artifact.tensors)} tensors"
    return _row("plan, shapes and scales", not problems, "; ".join(problems) or good)


def _replay(golden: Sequence[Golden], executor: Executor) -> Iterator[VerifyRow]:
    if not golden:
        yield _row("recorded calls", True, "none were recorded")
    for index, case in enumerate(golden):
        name = f"recorded call {index}"
        try:
            outputs = executor.run_leaves([leaf.to(executor.device) for leaf in case.inputs])
        except FpcompilerError as error:
            yield _row(name, False, str(error))
            return
        yield _compare(name, case.outputs, outputs)


def _compare(name: str, expected: Sequence[Tensor], outputs: Sequence[Any]) -> VerifyRow:
    actual = [torch.as_tensor(output).cpu() for output in outputs if output is not None]
    kinds = [(t.shape, t.dtype) for t in actual]
    if kinds != [(t.shape, t.dtype) for t in expected]:
        return _row(name, False, "the outputs have other shapes or dtypes than recorded")
    ratios = [_ratio(reference, value) for reference, value in zip(expected, actual, strict=True)]
    bits = all(map(torch.equal, expected, actual))
    # NaN is not at least anything, so it fails; and it is shown, although min() would hide it.
    worst = min(ratios, key=lambda ratio: (not math.isnan(ratio), ratio), default=math.inf)
    detail = f"SQNR {worst:.1f} dB, {'bit-equal' if bits else 'not bit-equal'}"
    return _row(name, worst >= GOLDEN_DB, detail)


def _ratio(reference: Tensor, value: Tensor) -> float:
    if not reference.is_floating_point() and not torch.equal(reference, value):
        return -math.inf  # Indices and truth values are right or wrong.
    distance = Distance()
    distance.add(reference, value)
    return distance.sqnr_db
