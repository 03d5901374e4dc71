"""Verifies an artifact: its file, its plan against its tensors, and its recorded calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fpcompiler.artifact import Artifact, Golden, check, read
from fpcompiler.errors import FpcompilerError
from fpcompiler.runtime.compare import Distance
from fpcompiler.runtime.executor import Executor
from fpcompiler.runtime.tables import VerifyReport, VerifyRow

GOLDEN_DB: Final = 40.0
"""SQNR of a replayed output that needs no explanation; a wrong weight or kernel is far below it."""

NOISE_RUNS: Final = 3
NOISE_MARGIN_DB: Final = 6.0
LEAST_DB: Final = 6.0
"""What passes below that, see :func:`_noise`: twice the noise, but at most half the signal."""


def verify(artifact: Artifact, executor: Executor, source: Path | None) -> VerifyReport:
    """Make every check and return the results; a failed check raises nothing.

    Args:
        artifact: What was loaded or compiled.
        executor: Runs it; replays happen from the initial state, with a state of their own.
        source: The file it was loaded from, which is read again; None if it is in memory only.
    """
    rows = [_file(source)] if source else []
    rows.append(_plan(artifact))
    rows.extend(_replay(artifact, executor.fresh()))
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


def _replay(artifact: Artifact, executor: Executor) -> Iterator[VerifyRow]:
    if not artifact.golden:
        yield _row("recorded calls", True, "none were recorded")
        return
    try:
        replayed = _run(artifact.golden, executor)
        found = [ratios(c.outputs, o) for c, o in zip(artifact.golden, replayed, strict=True)]
        explained = all(ratio >= GOLDEN_DB for call in found for ratio in call)
        noise = [math.inf] * len(found) if explained else _noise(artifact, executor, replayed)
    except FpcompilerError as error:
        yield _row("recorded calls", False, str(error))
        return
    for index, case in enumerate(artifact.golden):
        bits = all(map(torch.equal, case.outputs, replayed[index]))
        yield judge(f"recorded call {index}", found[index], noise[index], bits)


def _run(golden: Sequence[Golden], executor: Executor) -> list[list[Tensor]]:
    """Run the recorded calls one after the other."""
    calls = []
    for case in golden:
        outputs = executor.run_leaves([leaf.to(executor.device) for leaf in case.inputs])
        calls.append([torch.as_tensor(output).cpu() for output in outputs])
    return calls


def _noise(
    artifact: Artifact, executor: Executor, replayed: Sequence[Sequence[Tensor]]
) -> list[float]:
    """Return, per call, the SQNR that changes of the last bit of the tensors alone lead to.

    Another BLAS, or another number of threads, adds in another order. An activation close to the
    middle between two codes then rounds to the other one, and that difference goes through all
    layers after it. How much of this a model shows is a property of the model, so it is measured.
    """
    worst = [math.inf] * len(replayed)
    for seed in range(NOISE_RUNS):
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: _jittered(t, generator) for key, t in artifact.tensors.items()}
        calls = _run(artifact.golden, Executor(artifact.plan, tensors, executor.device))
        found = [ratios(a, b) for a, b in zip(replayed, calls, strict=True)]
        worst = [min(least, *ratios) for least, ratios in zip(worst, found, strict=True)]
    return worst


def _jittered(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return a tensor with each value changed by -1, 0 or 1 units of its last place."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return tensor
    step = torch.randint(-1, 2, tensor.shape, generator=generator).to(tensor.dtype)
    return tensor * (1 + step * torch.finfo(tensor.dtype).eps)


def measure_noise(artifact: Artifact) -> list[float]:
    """Return, per recorded call, the SQNR in dB that changes of last bits alone lead to."""
    executor = Executor(artifact.plan, artifact.tensors)
    return _noise(artifact, executor, _run(artifact.golden, executor))


def ratios(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> list[float]:
    """Return the SQNR of each output; minus infinity where shape or dtype differ."""
    if len(expected) != len(actual):
        return [-math.inf]
    return [_ratio(reference, value) for reference, value in zip(expected, actual, strict=True)]


def judge(name: str, ratios: Sequence[float], noise: float, bits: bool) -> VerifyRow:
    """Return what to say of a replayed call.

    Args:
        name: Of the call.
        ratios: The SQNR of each output, in dB.
        noise: What changes of last bits alone lead to; infinity if that is not known.
        bits: Whether all outputs are equal.
    """
    # NaN is not at least anything, so it fails; and it is shown, although min() would hide it.
    worst = min(ratios, key=lambda ratio: (not math.isnan(ratio), ratio), default=math.inf)
    if worst == -math.inf:
        return _row(name, False, "outputs have other shapes or dtypes or integers than recorded")
    detail = f"SQNR {worst:.1f} dB, {'bit-equal' if bits else 'not bit-equal'}"
    if not math.isfinite(noise):
        return _row(name, worst >= GOLDEN_DB, detail)
    detail += f"; changes of the last bit alone give {noise:.1f} dB"
    return _row(name, worst >= min(GOLDEN_DB, max(LEAST_DB, noise - NOISE_MARGIN_DB)), detail)


def _ratio(reference: Tensor, value: Tensor) -> float:
    if (reference.shape, reference.dtype) != (value.shape, value.dtype):
        return -math.inf
    if not reference.is_floating_point() and not torch.equal(reference, value):
        return -math.inf  # Indices and truth values are right or wrong.
    distance = Distance()
    distance.add(reference, value)
    return distance.sqnr_db
