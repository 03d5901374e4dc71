"""Kernels of every kind and target, compiled and checked without a GPU.

    python examples/benchmarks/prove_kernels.py

It needs nvcc and the extra ``cuda``, and with the extra ``dsl`` it compares with CuTe DSL. Kernels
stay in the cache, so that only the first run takes a minute of processor time for each. It prints
a table and writes ``results/prove_kernels.json``.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fpcompiler.cli.output import markdown_table
from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.cutlass import choose, emit
from fpcompiler.codegen.kernel import BuiltKernel
from fpcompiler.codegen.legalize import legalize
from fpcompiler.codegen.problem import Rows
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

KERNELS = (
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
    """Compile and check all kernels, print the table and write the record."""
    options = Options.from_env()
    cache = KernelCache.from_options(options)
    rows = []
    for pair, arch, m in KERNELS:
        problem = legalize("", *map(Operand.parse, pair), (4096, 4096), arch, rows=m)
        built = cache.build(emit(choose([problem])[problem]))
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
