"""Single layers on a Hopper GPU: kernels of packed weights against cuBLAS in bf16.

Each layer takes bf16 activations and gives bf16 results, so quantizing the activations is part of
its time. It is recorded in CUDA graphs over as many copies of the weights as do not fit into the
L2 cache; graphs of all candidates are replayed in turn, and medians compared. FP8 with a scale for
each row and token (``torch._scaled_mm``, activations quantized beforehand) stands beside it, and so
do our products without quantizing. If gemlite is installed, its layers are timed too; it tunes its
kernels for each size, so choose some:

    python examples/benchmarks/hopper_layers.py      # on a machine with the GPU, nvcc and g++
    python examples/benchmarks/hopper_layers.py --gemlite --rows 1 16 256 --sizes 14336x4096

No compiler of models is needed. It takes a minute or two and writes
``results/hopper_layers.json``, with ``--gemlite`` ``results/hopper_gemlite.json``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks import gemlite_layers
from examples.benchmarks.cuda_graphs import Launch, recorded, seconds
from fpcompiler.artifact.kernels import Instance
from fpcompiler.codegen import hopper
from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.problem import OutputType
from fpcompiler.codegen.rebuild import quantize_kernels
from fpcompiler.codegen.torch_operators import build_operators
from fpcompiler.numerics import pack, quantize
from fpcompiler.operand import Operand
from fpcompiler.options import Options
from fpcompiler.runtime.cuda.fragments import Mode
from fpcompiler.runtime.cuda.layers import CudaLinear, Gemm, Machine
from fpcompiler.runtime.cuda.operators import load_operators, open_library
from fpcompiler.runtime.cuda.problem import QuantizeProblem
from fpcompiler.runtime.cuda.quantizers import QuantizeKernels
from fpcompiler.scheme.presets import find_preset

ARCH = "sm_90a"
SCHEMES = ("w4a6-row", "w4a4-row", "w4a8-row", "w4a6", "nvfp4", "w4a16")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SIZES = ((4096, 4096), (14336, 4096), (4096, 14336), (1152, 1152))
L2_BYTES = 300_000_000
MOST_COPIES = 24
BEFOREHAND = "quantized beforehand"
REPLAYS = 2


@dataclass(frozen=True)
class Scheme:
    """A scheme with its compiled kernels."""

    name: str
    weight: Operand
    activation: Operand | None
    gemm: Gemm
    quantizers: QuantizeKernels


def prepare(names: Sequence[str]) -> list[Scheme]:
    """Compile and load the kernels of schemes, all at once."""
    options = Options.from_env()
    cache = KernelCache.from_options(options)
    jobs: list[tuple[str, Operand, Operand | None, Any, Any]] = []
    for name in names:
        preset = find_preset(name)
        weight = Operand.parse(preset.weight)
        activation = None if preset.activation == "none" else Operand.parse(preset.activation)
        instance = hopper.packed_gemm(weight, activation, ARCH, OutputType.BF16)
        assert instance is not None, name
        source = None
        if activation is not None:
            own = activation.format.name == instance.a
            problem = QuantizeProblem(activation, "bf16", stored="" if own else instance.a)
            source = quantize_kernels((problem,), ARCH)
        jobs.append((name, weight, activation, instance, source))
    sources = [hopper.emit(instance) for *_, instance, _ in jobs]
    sources += [source for *_, source in jobs if source is not None]
    with ThreadPoolExecutor(8) as pool:
        built = dict(zip((s.text for s in sources), pool.map(cache.build, sources), strict=True))
    load_operators(build_operators(options))
    schemes = []
    for name, weight, activation, instance, source in jobs:
        library = built[hopper.emit(instance).text].path
        description = Instance(instance.name, "gemm", hopper.describe(instance), {}, "")
        gemm = Gemm.of(description, open_library(library))
        paths = [] if source is None else [built[source.text].path]
        schemes.append(Scheme(name, weight, activation, gemm, QuantizeKernels.of(paths)))
    return schemes


def layers_of(scheme: Scheme, n: int, k: int, count: int) -> list[CudaLinear]:
    """Return layers with other codes each; scales are those of one quantized weight."""
    machine = Machine.of(torch.device("cuda"))
    codes, scales = quantize(torch.randn(n, k, device="cuda") * 0.02, scheme.weight)
    found = []
    for index in range(count):
        w = [pack(codes.roll(index, 0), 4), *scales]
        found.append(
            CudaLinear(
                {"decode": scheme.gemm},
                machine,
                w,
                None,
                scheme.activation,
                scheme.weight,
                k,
                torch.bfloat16,
                scheme.name,
            )
        )
    return found


def calls_of(scheme: Scheme, layers: Sequence[CudaLinear], x: Tensor) -> list[Launch]:
    """Return a call for each layer: quantizing, and the product."""
    status = _status()

    def call(layer: CudaLinear) -> Tensor:
        if scheme.activation is None:
            return layer.multiply(layer.prepare_values(x))
        prepared = scheme.quantizers.quantize(layer.kind, x, status)
        assert prepared is not None
        return layer.multiply(prepared)

    return [lambda layer=layer: call(layer) for layer in layers]


def products_of(scheme: Scheme, layers: Sequence[CudaLinear], x: Tensor) -> list[Launch]:
    """Return the products alone, of an input that was quantized before."""
    prepared = scheme.quantizers.quantize(layers[0].kind, x, _status())
    assert prepared is not None
    return [lambda layer=layer: layer.multiply(prepared) for layer in layers]


def _status() -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device="cuda")


def plain_calls(x: Tensor, weights: Sequence[Tensor]) -> list[Launch]:
    return [lambda w=w: functional.linear(x, w) for w in weights]  # type: ignore[misc]


def fp8_calls(n: int, k: int, m: int, count: int) -> list[Launch]:
    x = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
    weights = [torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn) for _ in range(count)]
    token, row = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
    return [
        lambda w=w: torch._scaled_mm(x, w.T, token, row, out_dtype=torch.bfloat16) for w in weights
    ]


def measure(
    schemes: Sequence[Scheme], n: int, k: int, rows: Sequence[int], rounds: int, gemlite: bool
) -> list[dict[str, Any]]:
    """Return the medians of all candidates, in seconds, for each number of rows."""
    packed = min(MOST_COPIES, max(4, 2 * L2_BYTES // (n * k)))
    whole = min(MOST_COPIES, max(2, L2_BYTES // (2 * n * k)))
    layers = {scheme.name: layers_of(scheme, n, k, packed) for scheme in schemes}
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(whole)]
    kinds = [*gemlite_layers.KINDS] if gemlite else []
    theirs = {kind: gemlite_layers.layers_of(kind, weights * 2)[:packed] for kind in kinds}
    found = []
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        launches: dict[str, list[Launch]] = {"bf16": plain_calls(x, weights) * 2}
        if m % 16 == 0:
            launches[f"fp8, {BEFOREHAND}"] = fp8_calls(n, k, m, whole)
        for scheme in schemes:
            launches[scheme.name] = calls_of(scheme, layers[scheme.name], x)
            if scheme.activation is not None:
                name = f"{scheme.name}, {BEFOREHAND}"
                launches[name] = products_of(scheme, layers[scheme.name], x)
        for kind, rest in theirs.items():
            launches[kind] = gemlite_layers.calls_of(rest, x)
        graphs = {name: recorded(calls) for name, calls in launches.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(rounds):
            for name, graph in graphs.items():
                times[name].append(seconds(graph, len(launches[name]), REPLAYS))
        medians = {name: statistics.median(row[1:]) for name, row in times.items()}
        found.append({"n": n, "k": k, "m": m, "seconds": medians})
        ratios = {name: medians["bf16"] / value for name, value in medians.items()}
        cells = " | ".join(f"{name} {value:.2f}x" for name, value in ratios.items())
        print(f"{n} x {k}, M = {m}: bf16 {medians['bf16'] * 1e6:.1f} us | {cells}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="replays of each graph")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M")
    parser.add_argument("--sizes", type=size, nargs="+", default=SIZES, metavar="NxK")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, metavar="NAME")
    parser.add_argument("--gemlite", action="store_true", help="time its layers too")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("There is no GPU of compute capability 9.0.")
    if options.gemlite and not gemlite_layers.installed():
        raise SystemExit("--gemlite: it is not installed (pip install --no-deps gemlite).")
    begin = time.perf_counter()
    schemes = prepare(options.schemes)
    modes = {scheme.name: (scheme.gemm.mode or Mode.BF16).value for scheme in schemes}
    print(f"compiled in {time.perf_counter() - begin:.0f} s: {modes}", flush=True)
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "gemlite": importlib.metadata.version("gemlite") if options.gemlite else None,
        "rounds": options.rounds,
        "modes": modes,
        "rows": [],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / ("hopper_gemlite.json" if options.gemlite else "hopper_layers.json")
    for n, k in options.sizes:
        record["rows"] += measure(schemes, n, k, options.rows, options.rounds, options.gemlite)
        file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{file}; {time.perf_counter() - begin:.0f} s in all")


def size(text: str) -> tuple[int, int]:
    """Parse ``NxK``."""
    n, k = map(int, text.split("x"))
    return n, k


if __name__ == "__main__":
    main()
