"""Which GPU kernels models need, and what compiling them costs; no GPU is needed.

    python examples/benchmarks/gpu_kernels.py                    # kernels of every model
    python examples/benchmarks/gpu_kernels.py --build smollm2    # and compile some, cold and warm

Every GEMM of every model is legalized for every target and scheme: it gets a kernel, or the reason
is counted. The models of the zoo are compiled for their real layers; those of full size are built
without weights (transformers and diffusers must be installed). Results go to
``results/gpu_kernels.json`` beside this file; what was compiled is added to what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fpcompiler
from examples.benchmarks.memory import machine
from fpcompiler.codegen import cutlass
from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.gemms import Gemm, gemms_of
from fpcompiler.codegen.kernel_plan import plan_kernels
from fpcompiler.codegen.nvcc import find_nvcc
from fpcompiler.codegen.package import build_sources
from fpcompiler.codegen.problem import Activation, OutputType
from fpcompiler.errors import DependencyError
from fpcompiler.options import Options
from fpcompiler.scheme import Scheme

RESULTS = Path(__file__).parent / "results" / "gpu_kernels.json"
TARGETS = ("sm_100a", "sm_120a", "sm_90a")
SCHEMES = (
    "nvfp4", "mxfp4", "w4a4", "w4a6", "w4a8", "w4a4-row", "w4a6-row", "w4a8-row", "w4a16",
    "w=f4E1M2FN@row:f32,a=f6E3M2FN@token:f32",
    "w=f4E3M0FN@row:f32/block32:f8E8M0FNU,a=f6E2M3FN@block32:f8E8M0FNU",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--build", nargs="+", choices=sorted(MODELS), default=[])
    parser.add_argument("--build-schemes", nargs="+", default=["nvfp4", "w4a6"])
    parser.add_argument("--build-targets", nargs="+", choices=TARGETS, default=list(TARGETS[:2]))
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write the numbers")
    options = parser.parse_args(arguments)
    report = _report(options.output)
    found = dict(_models(options.models))
    for name, gemms in found.items():
        report["models"][name] = coverage(gemms)
    Console(width=150).print(table(report["models"]))
    with tempfile.TemporaryDirectory() as folder:
        cache = KernelCache(Path(folder), find_nvcc(Options.from_env())) if options.build else None
        for name in options.build:
            for scheme in options.build_schemes:
                for target in options.build_targets:
                    assert cache is not None
                    row = cost(found[name], scheme, target, cache)
                    print(f"{name}, {scheme}, {target}: {row}", flush=True)
                    report["builds"][f"{name} {scheme} {target}"] = row
                    _write(options.output, report)
    _write(options.output, report)
    print(f"written to {options.output}")


def coverage(gemms: Sequence[Gemm]) -> dict[str, Any]:
    """Return which kernels the GEMMs of a model need, by target and scheme, and why some lack."""
    cases: dict[str, Any] = {}
    for target in TARGETS:
        for scheme in SCHEMES:
            plan = plan_kernels(_in_scheme(gemms, scheme), target)
            reasons = Counter(
                row.replace(repr(layer), "...")
                for layer, row in plan.layers.items()
                if isinstance(row, str)
            )
            cases[f"{target} {scheme}"] = {
                "with_kernels": len(plan.layers) - reasons.total(),
                "kernels": [instance.name for instance in plan.instances],
                "reasons": dict(reasons),
            }
    shapes = Counter((gemm.n, gemm.k) for gemm in gemms)
    return {
        "gemms": len(gemms),
        "shapes": [{"n": n, "k": k, "layers": count} for (n, k), count in shapes.items()],
        "cases": cases,
    }


def cost(gemms: Sequence[Gemm], scheme: str, target: str, cache: KernelCache) -> dict[str, Any]:
    """Compile the kernels of a model, then again.

    The cache is empty when the run begins. A kernel of several models is compiled once and counts
    for each of them, by what that took.
    """
    plan = plan_kernels(_in_scheme(gemms, scheme), target)
    sources = [cutlass.emit(instance) for instance in plan.instances]
    built = build_sources(sources, cache)
    begin = time.perf_counter()
    again = build_sources(sources, cache)
    warm = time.perf_counter() - begin
    assert all(kernel.cached for kernel in again.values())
    metadata = [kernel.metadata for kernel in built.values()]
    resources = [each for row in metadata for each in row["resources"]]
    return {
        "kernels": [row["name"] for row in metadata],
        "cold_cpu_seconds": round(sum(row["cost"]["seconds"] for row in metadata), 1),
        "peak_mb": max(row["cost"]["peak_mb"] for row in metadata),
        "library_bytes": sum(row["bytes"] for row in metadata),
        "registers": max(each["registers"] for each in resources),
        "spilled_bytes": sum(each["stores"] + each["loads"] for each in resources),
        "warm_seconds": round(warm, 3),
        "toolchain": metadata[0]["toolchain"],
    }


def table(models: Mapping[str, Any]) -> Table:
    """Return one row for each target and scheme: layers with kernels and kernels, by model."""
    result = Table(title="layers with kernels, of all; in brackets the kernels compiled for them")
    for header in ("target", "scheme", *models):
        result.add_column(header, overflow="fold")
    for target in TARGETS:
        for scheme in SCHEMES:
            cells = []
            for model in models.values():
                case = model["cases"][f"{target} {scheme}"]
                kernels = f" ({len(case['kernels'])})" if case["kernels"] else ""
                cells.append(f"{case['with_kernels']}/{model['gemms']}{kernels}")
            result.add_row(target, scheme, *cells)
    return result


def _in_scheme(gemms: Sequence[Gemm], scheme: str) -> list[Gemm]:
    base = Scheme.parse(scheme).base
    assert base.weight is not None
    return [replace(gemm, weight=base.weight, activation=base.activation) for gemm in gemms]


def _models(names: Sequence[str]) -> Iterator[tuple[str, list[Gemm]]]:
    for name in names:
        try:
            yield name, MODELS[name]()
        except (DependencyError, ImportError) as error:
            print(f"{name} is left out: {error}")


def _compiled(load: Callable[[], tuple[nn.Module, tuple[Any, ...]]]) -> list[Gemm]:
    model, example = load()
    artifact = fpcompiler.compile(model, "w4a6", example_inputs=example).artifact
    return list(gemms_of(artifact.plan, artifact.tensors))


def _smollm2() -> tuple[nn.Module, tuple[Any, ...]]:
    from examples.zoo import smollm2

    return smollm2.load(), smollm2.example_inputs()


def _minilm() -> tuple[nn.Module, tuple[Any, ...]]:
    from examples.zoo import minilm

    return minilm.load(), minilm.example_inputs()


def _dinov2() -> tuple[nn.Module, tuple[Any, ...]]:
    from examples.zoo import dinov2

    return dinov2.load(), dinov2.example_inputs()


def _dit() -> tuple[nn.Module, tuple[Any, ...]]:
    from examples.dit import weights

    model = weights.dit()
    return model, (torch.randn(2, 1, 28, 28), torch.tensor([10, 500]), torch.tensor([0, 1]))


def _without_weights(make: Callable[[], nn.Module]) -> list[Gemm]:
    """Return the linear layers of a model in bf16 that the scheme does not leave out."""
    with torch.device("meta"):
        model = make()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    base = Scheme.parse("w4a6")
    assert base.base.weight is not None
    return [
        Gemm(
            layer=name,
            weight=base.base.weight,
            activation=base.base.activation,
            n=linear.out_features,
            k=linear.in_features,
            bias=linear.bias is not None,
            function=Activation.NONE,
            output=OutputType.BF16,
        )
        for name, linear in linears.items()
        if base.for_layer(name).weight is not None
    ]


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8,
        )
    )  # fmt: skip


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel()


def _hunyuan() -> nn.Module:
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(
        num_attention_heads=16, attention_head_dim=88, in_channels=4, patch_size=2, num_layers=40,
        hidden_size=1408, mlp_ratio=4.3637, cross_attention_dim=1024, cross_attention_dim_t5=2048,
        pooled_projection_dim=1024, sample_size=128, text_len=77, text_len_t5=256,
    )  # fmt: skip


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel()


MODELS: Mapping[str, Callable[[], list[Gemm]]] = {
    "smollm2": lambda: _compiled(_smollm2),
    "minilm": lambda: _compiled(_minilm),
    "dinov2": lambda: _compiled(_dinov2),
    "dit": lambda: _compiled(_dit),
    "llama-3-8b": lambda: _without_weights(_llama),
    "pixart": lambda: _without_weights(_pixart),
    "hunyuan-dit": lambda: _without_weights(_hunyuan),
    "flux": lambda: _without_weights(_flux),
}


def _report(path: Path) -> dict[str, Any]:
    old = json.loads(path.read_text()) if path.is_file() else {"models": {}, "builds": {}}
    facts = {"date": time.strftime("%Y-%m-%d"), **machine()}
    return {**facts, "models": old["models"], "builds": old["builds"]}


def _write(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
