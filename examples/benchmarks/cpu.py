r"""How fast quantized linear layers are on this processor, against other libraries.

    python examples/benchmarks/cpu.py                 # everything, about half an hour
    python examples/benchmarks/cpu.py --quick         # whether everything works; one minute
    python examples/benchmarks/cpu.py --shapes 4096x4096 --rows 1 --threads 1 --schemes w4a6 \
        --peers torch-bf16 ort-int4-b32 --out /tmp/cpu.json

Each candidate multiplies an input ``[M, K]`` with a weight ``[N, K]``: fpcompiler from bf16 to
bf16, with the quantization of the input inside the time. Weights are cold: a candidate goes through
copies of them, 128 MB together (64 from 128 rows on, and at most 64 copies), as a model does with
its layers. Candidates take turns in short slots, in an order that changes from round to round, and
what is reported of two is the median of their ratios in the same round. With one thread the time of
the processor counts; with more the time of the clock, in slots without an interruption (``*``:
fewer than three; such a ratio reaches no bar). Each result is compared with the fp32 product first.

It prints a table for each shape and number of threads, whether the speeds promised for AVX-512 VNNI
were reached, and writes all rounds to ``results/cpu.json``. The machine should do nothing else.

Peers that are not installed are left out, and the table says so. To have them all, in a virtual
environment of their own (llama-cpp-python is compiled, about ten minutes)::

    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 rich pyyaml safetensors onnx onnxruntime openvino
    CMAKE_ARGS=-DGGML_NATIVE=ON peers/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    PYTHONPATH=. peers/bin/python examples/benchmarks/cpu.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.cpu_linear import report
from examples.benchmarks.cpu_linear.peers import CEILINGS, PEERS, SCHEMES, schemes, versions
from examples.benchmarks.cpu_linear.problem import (
    NotInstalledError,
    Peer,
    Problem,
    UnsuitableError,
    Work,
    relative_error,
)
from examples.benchmarks.cpu_linear.report import Cell, Measured
from examples.benchmarks.cpu_linear.timing import measure
from examples.benchmarks.packing import device_name
from fpcompiler import native
from fpcompiler.errors import FormatError
from fpcompiler.native import INSTRUCTION_SETS

SHAPES = ((4096, 4096), (11008, 4096), (1152, 1152), (576, 576))
ROWS = (1, 4, 16, 128, 512)
OUT = Path(__file__).parent / "results" / "cpu.json"

FULL = {"shapes": SHAPES, "rounds": 15, "cold_mb": 128.0}
QUICK = {"shapes": SHAPES[2:], "rounds": 3, "cold_mb": 1.0}
"""Options that ``--quick`` changes, unless they are given."""

WIDTH = 120
"""Characters of a line that no terminal limits."""

MANY_ROWS = 128
"""From here on reading weights is a small part of the work, and half as many bytes are cold."""


def shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [peer.name for peer in PEERS]
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxK")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES, help=f"of {', '.join(SCHEMES)}")
    parser.add_argument(
        "--peers", nargs="*", choices=names, metavar="PEER",
        help=f"of {', '.join(names)}; default: those that are installed",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument(
        "--kernel", choices=("native", "reference"), default="native",
        help="what runs the schemes; reference is plain PyTorch and slow",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="slots of each candidate; default: 15")
    parser.add_argument("--slot-ms", type=float, default=4, help="milliseconds of a slot")
    parser.add_argument("--cold-mb", type=float, help="default: 128; 0: weights in a cache")
    parser.add_argument("--quick", action="store_true", help="3 rounds, small shapes, 1 MB")
    parser.add_argument("--out", type=Path, help=f"default: {OUT.name} in results; none if --quick")
    options = parser.parse_args()
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.out is None and not options.quick:
        options.out = OUT
    if options.out == OUT and options.kernel != "native":
        parser.error("the record is of the native kernels: give another --out")
    return options


def problem(options: argparse.Namespace, nk: tuple[int, int], rows: int, threads: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*nk, generator=generator) / nk[1] ** 0.5
    x = torch.randn(rows, nk[1], generator=generator)
    cold = options.cold_mb * 1e6 / (2 if rows >= MANY_ROWS else 1)
    return Problem(weight, x, threads, int(cold))


def build(peer: Peer, given: Problem, explicit: bool) -> tuple[Work, float | None]:
    """Return the work of a peer and the relative error of its result.

    Raises:
        UnsuitableError: If it cannot do it; the message says why.
        SystemExit: If it was asked for and is not installed.
    """
    try:
        work = peer.build(given)
    except NotInstalledError as error:
        if explicit:
            raise SystemExit(f"cpu.py: {peer.name}: {error}") from None
        raise UnsuitableError(str(error)) from None
    except RuntimeError as error:  # of another library, for instance on an older processor
        raise UnsuitableError(f"it failed: {str(error).splitlines()[0]}") from error
    wrong = relative_error(work, given)
    if wrong is not None and not wrong <= peer.limit:
        raise UnsuitableError(f"its result is wrong: relative error {wrong:.3g}")
    return work, wrong


@torch.inference_mode()
def cell(
    options: argparse.Namespace,
    peers: Sequence[Peer],
    nk: tuple[int, int],
    rows: int,
    threads: int,
) -> Cell:
    given = problem(options, nk, rows, threads)
    works: dict[str, Work] = {}
    errors: dict[str, float | None] = {}
    missing: dict[str, str] = {}
    for peer in peers:
        try:
            works[peer.name], errors[peer.name] = build(peer, given, bool(options.peers))
        except UnsuitableError as reason:
            missing[peer.name] = str(reason)
    timings = measure(works, threads, options.rounds, options.slot_ms * 1e-3)
    measured = {
        name: Measured(timings[name], errors[name], work.weight_bytes, work.copies)
        for name, work in works.items()
    }
    return Cell(nk, rows, threads, measured, missing)


def machine() -> dict[str, Any]:
    library = native.library()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    parts = (line.partition(":") for line in lines)
    facts = {name.strip(): value.strip() for name, _, value in parts}
    flags = facts.get("flags", "").split()
    return {
        "device": device_name(torch.device("cpu")),
        "cpu": {name: facts.get(name, "") for name in ("cpu family", "model", "stepping")},
        "flags": " ".join(flag for flag in flags if flag.startswith(("avx", "amx", "fma", "f16c"))),
        "cores": os.cpu_count(),
        "native": library and INSTRUCTION_SETS[library.instructions],
        "versions": {"python": platform.python_version(), **versions()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def settings(options: argparse.Namespace, peers: Sequence[Peer]) -> dict[str, Any]:
    return {
        "rounds": options.rounds,
        "slot_milliseconds": options.slot_ms,
        "cold_megabytes": options.cold_mb,
        "kernel": options.kernel,
        "notes": {peer.name: peer.note for peer in peers if peer.note},
    }


def written(record: dict[str, Any]) -> str:
    """Return JSON with a line for each row of a list, as there are hundreds of them."""
    lines = []
    for name, value in record.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    options, console = arguments(), Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    chosen = [p for p in PEERS if options.peers is None or p.name in options.peers]
    try:
        peers = [*CEILINGS, *chosen, *schemes(options.schemes, options.kernel)]
    except FormatError as error:
        raise SystemExit(f"cpu.py: {error}") from None
    cells: list[Cell] = []
    # Few threads first: those that a library has started stay.
    for threads in sorted(options.threads):
        torch.set_num_threads(threads)
        for nk in options.shapes:
            row = [cell(options, peers, nk, rows, threads) for rows in options.rows]
            console.print(report.speeds(row, peers))
            cells += row
            save(options, peers, cells)
    if report.bar_records(cells):
        console.print(report.promises(cells))
    for line in report.missing(cells):
        console.print(line)
    if options.out is not None:
        console.print(f"written to {options.out}")


def save(options: argparse.Namespace, peers: Sequence[Peer], cells: Sequence[Cell]) -> None:
    """Write what has been measured so far."""
    if options.out is None:
        return
    record = {
        **machine(),
        "settings": settings(options, peers),
        "bars": report.bar_records(cells),
        "results": [entry for found in cells for entry in found.record()],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(written(record))


if __name__ == "__main__":
    main()
