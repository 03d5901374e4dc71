"""How fast weights are quantized and packed, one token quantized, and packed weights decoded.

Each candidate alternates with ``copy_`` of the fp32 tensor, which moves the bytes and does nothing
else, and medians are compared: of processor time with one thread, of the clock with more (for
which the machine must be idle). ``FPC_NATIVE=0`` measures PyTorch in place of the native library,
for which ``results/packing-pytorch.json`` is the record. Run it with ``python
examples/benchmarks/packing.py``; it prints a table and writes ``results/packing.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fpcompiler import native, numerics
from fpcompiler.native import INSTRUCTION_SETS
from fpcompiler.operand import Operand

OPERANDS = (
    "f4E2M1FN@row:f32",
    "f4E2M1FN@row:f32/block32:f8E8M0FNU:ceil",
    "f4E2M1FN@row:f32/block32:f8E8M0FNU",
    "f4E2M1FN@tensor:f32/block16:f8E4M3FN",
    "f6E2M3FN@block32:f8E8M0FNU",
)
SMALL = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""The weights of one layer of SmolLM2-135M, which has 30."""
TOKEN = ("f6E2M3FN@token:f32", "f6E2M3FN@block32:f8E8M0FNU")
DECODED = ("f4E2M1FN", "f6E2M3FN", "f8E4M3FN")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def seconds(work: Callable[[], object], device: torch.device, processor: bool) -> float:
    """Return the time that work takes: by the clock, or of the processor if others use it too."""
    clock = time.process_time if processor else time.perf_counter
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def compare(
    candidate: Callable[[], object], copy: Callable[[], object], rounds: int, device: torch.device
) -> tuple[float, float]:
    """Return the median seconds of a candidate and of the copy it alternates with."""
    # One thread is timed by the processor, which counts no waiting for other programs.
    processor = device.type == "cpu" and torch.get_num_threads() == 1
    candidate()
    copy()
    pairs = [
        (seconds(candidate, device, processor), seconds(copy, device, processor))
        for _ in range(rounds)
    ]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


@dataclass(frozen=True)
class Work:
    """What is timed: a name, fp32 values [R, K] that are read (or written), and what is done."""

    name: str
    values: list[torch.Tensor]
    run: Callable[[], object]


def works(size: int, device: torch.device) -> list[Work]:
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(size, size, generator=generator).to(device)
    small = [torch.randn(*shape, generator=generator).to(device) for shape in SMALL]
    token = torch.randn(1, 576, generator=generator).to(device)
    named = [("quantize+pack", [large], text) for text in OPERANDS]
    named += [("the weights of a layer of SmolLM2,", small, text) for text in OPERANDS[::2]]
    named += [("one token of 576,", [token], text) for text in TOKEN]
    found = [Work(f"{what} {text}", v, quantizing(v, text)) for what, v, text in named]
    return [*found, *(Work(f"decode {name}", [large], decoding(large, name)) for name in DECODED)]


def quantizing(values: list[torch.Tensor], text: str) -> Callable[[], object]:
    operand = Operand.parse(text)
    return lambda: [numerics.quantize_packed(value, operand) for value in values]


def decoding(value: torch.Tensor, name: str) -> Callable[[], object]:
    operand, target = Operand.parse(f"{name}@row:f32"), torch.empty_like(value)
    packed, _ = numerics.quantize_packed(value, operand)
    return lambda: numerics.decode_packed(packed, operand.format, value.shape[1], out=target)


def measure(size: int, rounds: int, threads: int, device: torch.device) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    rows: list[dict[str, object]] = []
    for work in works(size, device):
        targets = [torch.empty_like(value) for value in work.values]
        pairs = list(zip(targets, work.values, strict=True))
        taken, copied = compare(
            work.run, lambda pairs=pairs: [a.copy_(b) for a, b in pairs], rounds, device
        )
        count = sum(value.numel() for value in work.values)
        rows.append(
            {
                "name": work.name,
                "threads": threads,
                "values": count,
                "seconds": taken,
                "copy_seconds": copied,
                "fp32_gigabytes_per_second": 4e-9 * count / taken,
                "gigavalues_per_second": 1e-9 * count / taken,
                "times_the_copy": taken / copied,
            }
        )
        print(
            f"{work.name:68} {threads} threads {taken * 1e3:9.3f} ms "
            f"{4e-9 * count / taken:7.2f} GB/s {taken / copied:6.1f} x copy_"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "packing.json"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = [
        row for n in options.threads for row in measure(options.size, options.rounds, n, device)
    ]
    library = native.library() if device.type == "cpu" else None
    report = {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "native": library and INSTRUCTION_SETS[library.instructions],
        "shape": [options.size, options.size],
        "rounds": options.rounds,
        "results": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
