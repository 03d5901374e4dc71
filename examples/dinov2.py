"""Compile a vision transformer, DINOv2 ViT-S/14 with a saliency head, and look at photographs.

    python examples/dinov2.py --scheme w4a6

The artifact runs in a new process. Compared with fp32 are the features of the patches of eight
photographs, and the map of what stands out in each. The transposed convolutions of the saliency
head have no matrix form and stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import fpcompiler
from examples import console, new_process

with console.required():
    from examples.zoo import corpora, dinov2, metrics


def main(arguments: Sequence[str] | None = None) -> int:
    options = console.parser(__doc__).parse_args(arguments)
    path = console.artifact(options.folder, "dinov2", options.scheme)
    console.heading(f"DINOv2, a vision transformer of 12 layers, compiled to {options.scheme}")
    with console.step("load"):
        model, pixels = dinov2.load(), corpora.photographs()
    with console.step("look at eight photographs in fp32"), torch.no_grad():
        tokens, saliency = model(pixels)
    with console.step(f"compile, and save {path}") as track:
        example = dinov2.example_inputs()
        compiled = fpcompiler.compile(model, options.scheme, example_inputs=example, progress=track)
        compiled.save(path)
    with console.step("look at them by the artifact, in a new process"):
        after = new_process.call(path, {"pixels": pixels})
    with console.step("compare the layers on two photographs"):
        compared = compiled.compare(model, [dinov2.example_inputs()])

    console.heading("Before and after")
    console.table(
        ("", "fp32", "compiled"),
        [
            ("cosine of the patch features", "1", f"{metrics.mean_cosine(tokens, after['0']):.4f}"),
            ("mean error of the saliency (0 to 1)", "0",
             f"{metrics.mean_absolute_error(saliency, after['1']):.4f}"),
            ("bytes", *console.bytes_before_and_after(model, path)),
        ],
    )  # fmt: skip
    console.layer_summary(compiled, compared)
    return 0


if __name__ == "__main__":
    console.exit_with(main)
