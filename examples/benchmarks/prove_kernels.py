"""Kernels of every kind and target, compiled and checked without a GPU.

    python examples/benchmarks/prove_kernels.py
    python examples/benchmarks/prove_kernels.py --add      # those that are not in the record yet

It needs nvcc and the extra ``cuda``, and with the extra ``dsl`` it compares with CuTe DSL. Kernels
stay in the cache, so that only the first run takes a minute of processor time for each. It prints
a table and writes ``results/prove_kernels.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fpcompiler.cli.output import markdown_table
from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.cutlass import Instance, choose, emit
from fpcompiler.codegen.cutlass.quantized import QuantizedOutput
from fpcompiler.codegen.kernel import BuiltKernel
from fpcompiler.codegen.legalize import legalize
from fpcompiler.codegen.problem import Epilogue, Rows
from fpcompiler.codegen.proof.prove import LEVELS, prove
from fpcompiler.codegen.proof.record import Outcome, ProofRecord
from fpcompiler.operand import Operand
from fpcompiler.options import Options

NVFP4 = ("e2m1@tensor:f32/block16:e4m3", "e2m1@tensor:f32/block16:e4m3")
MXFP4 = ("e2m1@block32:e8m0", "e2m1@block32:e8m0")
W4A6 = ("e2m1@row:f32/block32:e8m0", "e2m3@block32:e8m0")
W4A8 = ("e2m1@row:f32/block32:e8m0", "e4m3@block32:e8m0")
W4A6_ROW = ("e2m1@row:f32", "e2m3@token:f32")
E3M0 = ("e3m0@block32:e8m0", "e3m2@block32:e8m0")


@dataclass(frozen=True)
class Kernel:
    """A kernel by what its layer is.

    Attributes:
        pair: Operands of weights and activations.
        arch: The architecture.
        rows: The range of M.
        residual: Whether the layer adds one.
        producer: If the layer quantizes its output as its input is: the activation before that.
    """

    pair: tuple[str, str]
    arch: str
    rows: Rows
    residual: bool = False
    producer: str | None = None

    def instance(self) -> Instance:
        """Return the instance to compile."""
        weight, activation = map(Operand.parse, self.pair)
        epilogue = Epilogue(residual=self.residual)
        problem = legalize(
            "", weight, activation, (4096, 4096), self.arch, rows=self.rows, epilogue=epilogue
        )
        instance = choose([problem])[problem]
        if self.producer is None:
            return instance
        return replace(instance, quantized=QuantizedOutput(str(activation), self.producer))


def kernels() -> Iterator[Kernel]:
    """Yield one kernel of each kind."""
    for pair, arch, rows in PLAIN:
        yield Kernel(pair, arch, rows)
    yield Kernel(NVFP4, "sm_100a", Rows.PREFILL, residual=True)
    yield Kernel(W4A6, "sm_120a", Rows.PREFILL, residual=True)
    yield Kernel(MXFP4, "sm_100a", Rows.PREFILL, producer="gelu_tanh")
    yield Kernel(W4A8, "sm_100a", Rows.DECODE, producer="")
    yield Kernel(W4A6, "sm_120a", Rows.PREFILL, producer="gelu_tanh")


PLAIN = (
    (W4A6_ROW, "sm_90a", Rows.DECODE), (W4A6_ROW, "sm_90a", Rows.PREFILL),
    (W4A6, "sm_100a", Rows.DECODE), (MXFP4, "sm_100a", Rows.DECODE),
    (NVFP4, "sm_100a", Rows.PREFILL), (W4A6_ROW, "sm_100a", Rows.PREFILL),
    (W4A8, "sm_100f", Rows.DECODE), (NVFP4, "sm_103a", Rows.PREFILL),
    (NVFP4, "sm_120a", Rows.PREFILL), (MXFP4, "sm_120a", Rows.PREFILL),
    (E3M0, "sm_120a", Rows.PREFILL), (W4A6_ROW, "sm_120a", Rows.PREFILL),
    (W4A6, "sm_120f", Rows.PREFILL),
)  # fmt: skip
"""Weight and activation, architecture, and the range of M."""

RESULTS = Path(__file__).resolve().parent / "results" / "prove_kernels.json"


def main() -> None:
    """Compile and check kernels, print the table and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--add", action="store_true", help="only those that are not recorded yet")
    added = parser.parse_args().add
    options = Options.from_env()
    cache = KernelCache.from_options(options)
    rows = json.loads(RESULTS.read_text("utf-8"))["kernels"] if added else []
    known = {row["kernel"] for row in rows}
    for instance in (kernel.instance() for kernel in kernels()):
        if instance.name in known:
            continue
        built = cache.build(emit(instance))
        rows.append(summary(prove(built, options=options), built))
        print(rows[-1]["kernel"], "passed" if rows[-1]["passed"] else "FAILED", file=sys.stderr)
    record = {
        "date": datetime.date.today().isoformat(),
        "toolchain": cache.nvcc.toolchain,
        "kernels": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def summary(record: ProofRecord, built: BuiltKernel) -> dict[str, Any]:
    """Return how each level ended, and what compiling took."""
    checked = [check for check in record.checks if check.outcome is not Outcome.SKIPPED]
    measured = {name: n for check in checks_of(record, "L6") for name, n in check.measured.items()}
    return {
        "kernel": record.kernel,
        "passed": record.passed,
        "levels": {level: outcome(record, level) for level in LEVELS},
        "controls": sum(len(check.controls) for check in checked),
        "controls_noticed": sum(sum(check.controls.values()) for check in checked),
        "registers": record.machine_code and record.machine_code.registers,
        "nvcc_seconds": built.metadata["cost"]["seconds"],
        "nvcc_peak_mb": built.metadata["cost"]["peak_mb"],
        "dsl_seconds": measured.get("dsl_seconds"),
        "failed": [c.to_json() for c in checked if c.outcome is Outcome.FAILED],
        "skipped": {c.name: c.detail for c in record.checks if c.outcome is Outcome.SKIPPED},
    }


def checks_of(record: ProofRecord, level: str) -> list[Any]:
    return [check for check in record.checks if check.level == level]


def outcome(record: ProofRecord, level: str) -> str:
    """Return ``failed``, how many checks passed, or that there were none."""
    found = [check.outcome for check in checks_of(record, level)]
    if Outcome.FAILED in found:
        return "failed"
    passed = found.count(Outcome.PASSED)
    return f"{passed} passed" if passed else "skipped"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    headers = ["kernel", *LEVELS, "controls red", "nvcc, s of CPU", "CuTe DSL, s of CPU"]
    return markdown_table(
        headers,
        [
            [
                row["kernel"].removeprefix("gemm_"), *row["levels"].values(),
                f"{row['controls_noticed']} of {row['controls']}", row["nvcc_seconds"],
                "-" if row["dsl_seconds"] is None else row["dsl_seconds"],
            ]
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
