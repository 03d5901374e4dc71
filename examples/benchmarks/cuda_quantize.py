"""How fast the kernels that quantize activations are, against a copy of the same tensor.

Each kernel alternates with ``copy_`` of its bf16 input, which reads and writes it. Both are
recorded in CUDA graphs over the same tensors, each tensor once, as many as ``--megabytes`` hold:
with large tensors nothing is in the cache; with few rows all of it is, as in a model. Medians of
the time of one launch are compared. Run it on a machine with a GPU and nvcc, with ``python
examples/benchmarks/cuda_quantize.py``; it takes a minute or two, prints a table and writes
``results/cuda_quantize.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.cuda_graphs import recorded, seconds
from fpcompiler.codegen.cuda import quantize_source
from fpcompiler.operand import Operand
from fpcompiler.runtime.cuda import Quantized, QuantizeLibrary, QuantizeProblem
from fpcompiler.runtime.cuda.quantize import Arguments, arguments_of

Beside = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

ROWS = (1, 16, 512, 4096)
COLUMNS = (4096, 14336)
EPS = 1e-5
MOST_TENSORS = 64


def problem(text: str, **options: object) -> QuantizeProblem:
    return QuantizeProblem(Operand.parse(text), "bf16", **options)  # type: ignore[arg-type]


PROBLEMS = (
    problem("f6E2M3FN@token:f32"),
    problem("f6E2M3FN@token:f32", stored="f8E4M3FN"),
    problem("f6E2M3FN@token:f32", stored="i8"),
    problem("f6E2M3FN@block32:f8E8M0FNU", stored="bf16"),
    problem("f8E4M3FN@token:f32"),
    problem("f4E2M1FN@token:f32"),
    problem("f6E2M3FN@block32:f8E8M0FNU"),
    problem("f6E2M3FN@block32:f8E8M0FNU:ceil", swizzled=True),
    problem("f4E2M1FN@token:f32/block32:f8E8M0FNU"),
    problem("f4E2M1FN@tensor:f32/block16:f8E4M3FN", swizzled=True, given=True),
    problem("f4E2M1FN@tensor:f32/block16:f8E4M3FN", swizzled=True),
    problem("f6E2M3FN@token:f32", hadamard=32),
    problem("f6E2M3FN@token:f32", producer="rms_norm", beside=("bf16", "", "", "")),
    problem("f6E2M3FN@block32:f8E8M0FNU", producer="rms_norm", beside=("bf16", "", "", "")),
    problem("f6E2M3FN@token:f32", producer="layer_norm_modulate", beside=("", "", "bf16", "bf16")),
    problem("f6E2M3FN@token:f32", producer="silu_mul", beside=("", "", "bf16", "")),
    problem("f6E2M3FN@token:f32", producer="silu_mul", beside=("", "", "bf16", ""), stored="i8"),
    problem("f6E2M3FN@token:f32", producer="gelu_tanh"),
)


def build(folder: Path) -> list[QuantizeLibrary]:
    """Compile each problem for this machine's GPU, some at a time."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise SystemExit("There is no nvcc on PATH.")
    suffix = "{}{}a".format(*torch.cuda.get_device_capability())

    def one(index: int) -> QuantizeLibrary:
        source = quantize_source([PROBLEMS[index]], f"sm_{suffix}")
        file = folder / f"{index}.cu"
        file.write_text(source.text)
        command = [
            nvcc, *source.flags, "-O3", "-shared", "-Xcompiler", "-fPIC",
            f"-gencode=arch=compute_{suffix},code=sm_{suffix}", str(file),
            "-o", str(file.with_suffix(".so")),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return QuantizeLibrary(file.with_suffix(".so"), [PROBLEMS[index]])

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        return list(pool.map(one, range(len(PROBLEMS))))


def beside_of(kind: QuantizeProblem, m: int, k: int) -> Beside:
    """Return what a producer reads: one row for all, but the other branch of a gated unit."""
    rows = m if kind.producer == "silu_mul" else 1
    shapes = ((k,), (k,), (rows, k), (1, k))
    tensors = [
        torch.randn(shape, device="cuda").to(torch.bfloat16) if type else None
        for shape, type in zip(shapes, kind.beside, strict=True)
    ]
    return tensors[0], tensors[1], tensors[2], tensors[3]


def moved_bytes(x: Tensor, beside: Beside, out: Quantized) -> int:
    tensors = [
        x,
        *(t for t in beside if t is not None),
        out.codes,
        out.outer_scale,
        out.block_scale,
    ]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(
    library: QuantizeLibrary, m: int, k: int, rounds: int, megabytes: int
) -> dict[str, object]:
    kind = library.problems[0]
    count = max(2, min(MOST_TENSORS, megabytes * 1_000_000 // (m * k * 4)))
    inputs = [torch.randn(m, k, device="cuda").to(torch.bfloat16) for _ in range(count)]
    copies = [torch.empty_like(x) for x in inputs]
    beside = [beside_of(kind, m, k) for _ in inputs]
    outs = [Quantized.empty(kind, m, k, "cuda", kind.row_bytes(-(-k // 128) * 128)) for _ in inputs]
    calls = list(zip(inputs, outs, beside, strict=True))
    arguments = [arguments_of(kind, x, out, own, EPS) for x, out, own in calls]

    def quantizing(own: Arguments) -> Callable[[], object]:
        return lambda: library.launch(0, own, torch.cuda.current_stream().cuda_stream)

    def copying(target: Tensor, x: Tensor) -> Callable[[], object]:
        return lambda: target.copy_(x)

    graphs = (
        recorded([quantizing(own) for own in arguments]),
        recorded([copying(*pair) for pair in zip(copies, inputs, strict=True)]),
    )
    for graph in graphs * 3:
        seconds(graph, count)
    pairs = [tuple(seconds(graph, count) for graph in graphs) for _ in range(rounds)]
    taken, copied = (statistics.median(column) for column in zip(*pairs, strict=True))
    if any(int(out.status) for out in outs):
        raise SystemExit(f"{kind}: a kernel found NaN in normal numbers.")
    moved, read = moved_bytes(inputs[0], beside[0], outs[0]), 2 * inputs[0].numel()
    return {
        "problem": str(kind),
        "m": m,
        "k": k,
        "tensors": count,
        "microseconds": taken * 1e6,
        "copy_microseconds": copied * 1e6,
        "gigabytes_per_second": moved / taken * 1e-9,
        "copy_gigabytes_per_second": 2 * read / copied * 1e-9,
        "of_the_copy": (moved / taken) / (2 * read / copied),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="replays of each graph")
    parser.add_argument("--megabytes", type=int, default=1000, help="of the tensors of one size")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device.")
    begin = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        libraries = build(Path(folder))
        print(f"compiled in {time.perf_counter() - begin:.0f} s")
        for library in libraries:
            for k in COLUMNS:
                for m in ROWS:
                    row = measure(library, m, k, options.rounds, options.megabytes)
                    rows.append(row)
                    print(
                        f"{row['problem']:78} {m:5} x {k:5} {row['microseconds']:8.2f} us "
                        f"{row['gigabytes_per_second']:7.0f} GB/s; copy_ "
                        f"{row['copy_microseconds']:8.2f} us "
                        f"{row['copy_gigabytes_per_second']:7.0f} GB/s",
                        flush=True,
                    )
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "rows": rows,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "cuda_quantize.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{file}; {time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
