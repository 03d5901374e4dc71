"""One step of a diffusion transformer on a GPU: PixArt's shape, an artifact against bf16 of torch.

The transformer of PixArt is built with random weights (diffusers; nothing is downloaded). Its
artifact runs as it is loaded, with CUDA graphs, and with ``compile_rest()``; beside it the same
module runs eagerly and under torch.compile. All take turns, and medians are compared. A step of
1024 x 1024 pixels has 4,096 tokens and 300 of the caption; classifier-free guidance makes a batch
of two.

    python examples/benchmarks/gpu_pixart.py --compile-only --layers 1     # anywhere
    python examples/benchmarks/gpu_pixart.py           # on a machine with the GPU and torch-mlir

It writes ``results/gpu_pixart.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fpcompiler
from examples.benchmarks.random_llama import fill

Step = Callable[[], object]


def build(layers: int | None) -> nn.Module:
    """Return PixArt's transformer in bf16 with random weights."""
    from diffusers import PixArtTransformer2DModel

    sizes = {"num_layers": layers} if layers else {}
    model = (
        PixArtTransformer2DModel(sample_size=128, caption_channels=4096, **sizes)
        .to(torch.bfloat16)
        .eval()
    )
    fill(model)
    return model


class Transformer(nn.Module):
    """PixArt's transformer as a function of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, latent: Tensor, caption: Tensor, timestep: Tensor, resolution: Tensor, ratio: Tensor
    ) -> Tensor:
        """Return what diffusers returns for a latent, a caption and a step."""
        conditions = {"resolution": resolution, "aspect_ratio": ratio}
        sample: Tensor = self.model(
            latent, caption, timestep, added_cond_kwargs=conditions, return_dict=False
        )[0]
        return sample


def call_of(batch: int, pixels: int) -> tuple[Tensor, ...]:
    """Return the arguments of a step."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(batch, 4, pixels // 8, pixels // 8, generator=generator)
    caption = torch.randn(batch, 300, 4096, generator=generator)
    resolution = torch.tensor([[pixels, pixels]] * batch)
    others = torch.full((batch,), 500), resolution.bfloat16(), torch.ones(batch, 1).bfloat16()
    return latent.bfloat16(), caption.bfloat16(), *others


def steps_of(
    artifact: Path, model: nn.Module, call: tuple[Tensor, ...], mode: str
) -> dict[str, Step]:
    """Return the runtimes on the GPU, ready to be called."""
    inputs = [tensor.cuda() for tensor in call]
    found: dict[str, Step] = {}
    for name, graphs in (("fpcompiler", True), ("fpcompiler-steps", False)):
        compiled = fpcompiler.load(artifact, device="cuda", trust=True, strict=True, graphs=graphs)
        found[name] = lambda run=compiled: run(*inputs)  # type: ignore[misc]
    rest = fpcompiler.load(artifact, device="cuda", trust=True, strict=True)
    rest.compile_rest()
    found["fpcompiler-rest"] = lambda: rest(*inputs)
    model = model.cuda()
    found["eager-bf16"] = lambda: model(*inputs)
    whole = torch.compile(model, mode=mode)
    found["torch-compile-bf16"] = lambda: whole(*inputs)
    return found


@torch.no_grad()
def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call; runtimes take turns."""
    for name, step in steps.items():
        begin = time.perf_counter()
        for _ in range(4):  # compiles, records
            step()
        torch.cuda.synchronize()
        ready, begin = time.perf_counter() - begin, time.perf_counter()
        step()
        torch.cuda.synchronize()
        first = time.perf_counter() - begin
        print(
            f"{name} is ready after {ready:.0f} s; at first a step takes {first * 1e3:.2f} ms",
            flush=True,
        )
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", default="w4a6-row")
    parser.add_argument("--target", nargs="+", default=["cpu", "sm_90a"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--layers", type=int, help="fewer blocks, to try it out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mode", default="max-autotune", help="of torch.compile")
    parser.add_argument("--compile-only", action="store_true", help="needs no GPU")
    parser.add_argument("--artifact", type=Path, help="keep it here; taken from here if it exists")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not options.compile_only and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; --compile-only needs none.")
    begin = time.perf_counter()
    model = Transformer(build(options.layers))
    call = call_of(options.batch, options.pixels)
    with tempfile.TemporaryDirectory() as folder:
        artifact = options.artifact or Path(folder) / "pixart.fpc"
        if not artifact.exists():
            # Embeddings of positions fix the size of pictures, so it is captured as it runs.
            fpcompiler.compile(
                model, options.scheme, example_inputs=call, target=options.target
            ).save(artifact)
        size = artifact.stat().st_size
        print(f"compiled in {time.perf_counter() - begin:.0f} s: {size / 1e6:.0f} MB")
        if options.compile_only:
            return
        times = measure(steps_of(artifact, model, call, options.mode), options.rounds)
    medians = {name: statistics.median(row) for name, row in times.items()}
    for name, seconds in medians.items():
        ratio = medians["torch-compile-bf16"] / seconds
        print(f"{name:20} {seconds * 1e3:8.2f} ms {ratio:6.2f}x")
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "compile_mode": options.mode,
        "scheme": options.scheme,
        "batch": options.batch,
        "pixels": options.pixels,
        "layers": options.layers or 28,
        "seconds": times,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "gpu_pixart.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{file}; {time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
