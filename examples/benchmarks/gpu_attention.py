"""Attention of decoding steps on a Hopper GPU: our kernel against torch's.

    python examples/benchmarks/gpu_attention.py      # on a machine with the GPU, nvcc and g++

Queries of one token, keys and values in a cache that is longer than what is seen, in bf16, with the
heads of LLaMA-3-8B. Each is recorded in CUDA graphs over as many caches as do not fit into the L2
cache; graphs are replayed in turn, and medians compared. It writes ``results/gpu_attention.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.cuda_graphs import Launch, recorded, seconds
from fpcompiler.codegen.attention.emit import attend_kernels
from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.torch_operators import build_operators
from fpcompiler.options import Options
from fpcompiler.runtime.cuda.attention import AttendKernels, AttendProblem, CudaAttention
from fpcompiler.runtime.cuda.layers import Machine
from fpcompiler.runtime.cuda.operators import load_operators

HEADS, GROUPS, WIDTH = 32, 8, 128
CASES = (
    (1, 2304, 200), (1, 2304, 2100), (1, 16384, 16000), (4, 2304, 2100), (16, 2304, 200),
    (16, 2304, 2100), (32, 2304, 2100),
)  # fmt: skip
"""Texts, positions of their caches, and positions that are seen."""

L2_BYTES = 400_000_000
MOST_COPIES = 48
REPLAYS = 2


def prepare() -> CudaAttention:
    """Compile and load the kernel."""
    options = Options.from_env()
    load_operators(build_operators(options))
    source = attend_kernels((AttendProblem("bf16", WIDTH),), "sm_90a")
    path = KernelCache.from_options(options).build(source).path

    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise SystemExit("The kernel took no such call.")

    machine = Machine.of(torch.device("cuda"))
    return CudaAttention(AttendKernels.of([path]), machine.sms, refused)


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)


def measure(own: CudaAttention, texts: int, keys: int, seen: int, rounds: int) -> dict[str, Any]:
    """Return the medians of both, in seconds."""
    copies = max(2, min(MOST_COPIES, L2_BYTES // (4 * texts * GROUPS * keys * WIDTH)))
    q, sizes = random(texts, HEADS, 1, WIDTH), (texts, GROUPS, keys, WIDTH)
    caches = [(random(*sizes), random(*sizes)) for _ in range(copies)]
    mask = (torch.arange(keys, device="cuda") < seen).expand(1, 1, 1, keys).contiguous()
    launches: dict[str, list[Launch]] = {
        "fpcompiler": [lambda k=k, v=v: own(q, k, v, mask, enable_gqa=True) for k, v in caches],  # type: ignore[misc]
        "torch": [
            lambda k=k, v=v: scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)  # type: ignore[misc]
            for k, v in caches
        ],
    }
    graphs = {name: recorded(calls) for name, calls in launches.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(seconds(graph, copies, REPLAYS))
    medians = {name: statistics.median(row[1:]) for name, row in times.items()}
    cells = ", ".join(f"{name} {value * 1e6:.1f} us" for name, value in medians.items())
    print(f"{texts} texts, {seen} of {keys} positions: {cells}", flush=True)
    return {"texts": texts, "keys": keys, "seen": seen, "seconds": medians}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="replays of each graph")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("There is no GPU of compute capability 9.0.")
    own = prepare()
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "heads": [HEADS, GROUPS, WIDTH],
        "rounds": options.rounds,
        "rows": [measure(own, *case, options.rounds) for case in CASES],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "gpu_attention.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(file)


if __name__ == "__main__":
    main()
