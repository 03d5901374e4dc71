"""Builds what ``test_on_gpu.py`` needs, on a machine with nvcc and the compiler, without a GPU.

Run ``python -m tests.runtime.cuda.gpu_bundle FOLDER`` in the root of the repository, and bring the
folder to the machine with the GPU: ``pytest tests/runtime/cuda/test_on_gpu.py --gpu-bundle
FOLDER``.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

import fpcompiler
from fpcompiler.artifact import Artifact, jsonfile, save
from fpcompiler.artifact.kernels import INDEX, Instance, KernelIndex, LayerKernels, TargetKernels
from fpcompiler.codegen.build import KernelCache
from fpcompiler.codegen.cutlass.emit import emit
from fpcompiler.codegen.cutlass.instance import instances
from fpcompiler.codegen.kernel import KernelSource
from fpcompiler.codegen.legalize import legalize
from fpcompiler.codegen.problem import OutputType, Rows
from fpcompiler.codegen.rebuild import quantize_kernels
from fpcompiler.codegen.torch_operators import build_operators
from fpcompiler.huggingface import CachedDecoder
from fpcompiler.operand import Operand
from fpcompiler.options import Options
from fpcompiler.runtime.cuda.problem import QuantizeProblem
from tests.hf_models import hf_model
from tests.models import Llama, token_ids
from tests.plans import Mlp, mlp_artifact, with_golden

ARCH = "sm_90a"
WEIGHT = "f4E2M1FN@row:f32"
ACTIVATIONS = {
    "a4": "f4E2M1FN@token:f32",
    "a6": "f6E2M3FN@token:f32",
    "a8": "f8E4M3FN@token:f32",
}
ADDS = "-residual"
"""End of the names of kernels that add a residual; as a layer's name, what none of a plan has."""

LLAMA = "a6"
PACKED = {
    "i8": "w4a6-row", "i8-e2m1": "w4a4-row", "e4m3": "w4a8-row", "mx": "w4a6", "mx4": "mxfp4",
    "nv": "nvfp4", "plain": "w4a16",
}  # fmt: skip
"""Schemes whose layers run on kernels of packed weights, one for each kind."""

DECODER = "decoder"
"""The language model with a KV cache."""

POSITIONS = 64
"""Of its cache."""


def quantize_problems() -> Iterator[QuantizeProblem]:
    """Yield what the models quantize: plain values, and for the language model what is fused."""
    for name, text in ACTIVATIONS.items():
        operand, stored = Operand.parse(text), "" if name == "a8" else "f8E4M3FN"
        for type in ("f32", "bf16"):
            yield QuantizeProblem(operand, type, stored=stored)
    fused = (("rms_norm", ("bf16", "", "", "")), ("silu_mul", ("", "", "bf16", "")))
    for producer, beside in fused:
        operand = Operand.parse(ACTIVATIONS[LLAMA])
        yield QuantizeProblem(operand, "bf16", producer, beside, stored="f8E4M3FN")


def sources() -> Iterator[tuple[str, str, KernelSource]]:
    """Yield name, role and source of each library."""
    pair = Operand.parse(WEIGHT), Operand.parse(ACTIVATIONS["a6"])
    for output in (OutputType.F32, OutputType.BF16):
        for rows in Rows:
            problem = legalize("any", *pair, (128, 128), ARCH, rows=rows, output=output)
            yield f"{rows.value}-{output.value}", "gemm", emit(instances(problem)[0])
            added = replace(problem, epilogue=replace(problem.epilogue, residual=True))
            yield f"{rows.value}-{output.value}{ADDS}", "gemm", emit(instances(added)[0])
    yield "quantize", "quantize", quantize_kernels(tuple(quantize_problems()), ARCH)


def build(options: Options) -> tuple[dict[str, Instance], dict[str, bytes]]:
    """Return the instances and the libraries, by the names of instances and of files."""
    cache = KernelCache.from_options(options)
    found, files = {}, {}
    operators = build_operators(options).read_bytes()
    built = [("operators", "operators", {}, operators)]
    for name, role, source in sources():
        kernel = cache.build(source)
        print(f"{name}: {kernel.metadata['cost']}", flush=True)
        built.append((name, role, dict(source.description), kernel.path.read_bytes()))
    for name, role, problem, data in built:
        file = f"{ARCH}.{name}.so"
        sha256 = hashlib.sha256(data).hexdigest()
        found[name] = Instance(name, role, problem, {"library": file}, sha256)
        files[file] = data
    return found, files


def with_kernels(
    artifact: Artifact,
    found: dict[str, Instance],
    files: dict[str, bytes],
    layers: Iterable[str],
    output: str,
) -> Artifact:
    """Return an artifact with the kernels that its layers use, and those that add a residual.

    The layers of its plan do not use the latter: their residuals are added by torch.
    """
    uses = {"decode": f"decode-{output}", "prefill": f"prefill-{output}", "quantize": "quantize"}
    adding = {use: f"{name}{ADDS}" for use, name in uses.items() if use != "quantize"}
    own = {name: found[name] for name in (*uses.values(), *adding.values(), "operators")}
    rows = {layer: LayerKernels(uses) for layer in layers} | {ADDS: LayerKernels(adding)}
    index = KernelIndex({ARCH: TargetKernels(ARCH, ("9.0",), {}, own, rows)})
    libraries = {i.files["library"]: files[i.files["library"]] for i in own.values()}
    kernels = {INDEX: jsonfile.dump(index.to_json()), **libraries}
    return replace(artifact, kernels=kernels)


def main(folder: Path) -> None:
    """Write one artifact per model."""
    folder.mkdir(parents=True, exist_ok=True)
    found, files = build(Options.from_env())
    torch.manual_seed(0)
    for name, activation in ACTIVATIONS.items():
        plain = with_golden(mlp_artifact(Mlp(200, 340), WEIGHT, activation), torch.randn(9, 200))
        made = with_kernels(plain, found, files, ("up", "down"), "f32")
        save(folder / f"mlp-{name}.fpc", made)
    model = Llama(width=256).eval().bfloat16()
    inputs = (token_ids(2, 12),)
    compiled = fpcompiler.compile(model, "w4a6-row", example_inputs=inputs, target="reference")
    layers = [row.name for row in compiled.artifact.plan.layers if row.quantized]
    save(folder / "llama.fpc", with_kernels(compiled.artifact, found, files, layers, "bf16"))
    for name, scheme in PACKED.items():
        packed = fpcompiler.compile(model, scheme, example_inputs=inputs, target=["cpu", ARCH])
        packed.save(folder / f"packed-{name}.fpc")
        print(
            f"packed-{name}: {sorted({i.name for _, i in _instances(packed.artifact)})}", flush=True
        )
    decoder().save(folder / f"{DECODER}.fpc")


def decoder() -> fpcompiler.CompiledModel:
    """Return a tiny Llama in bf16 with its KV cache."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "attn_implementation": "sdpa"}
    cached = CachedDecoder(hf_model("hf-llama", **sizes).bfloat16(), 1, POSITIONS, last_logits=1)
    inputs = token_ids(1, 8), torch.arange(8)
    return fpcompiler.compile(cached, "w4a6-row", example_inputs=inputs, target=["cpu", ARCH])


def _instances(artifact: Artifact) -> list[tuple[str, Instance]]:
    return KernelIndex.of(artifact.kernels).all_instances()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
