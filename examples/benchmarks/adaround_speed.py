"""How long learning the roundings of a DiT block takes, against the published loop.

The loop is written here a second time, from FP4DiT (arXiv 2503.15465, section 3.3) and the order of
its released code, and shares nothing with fpcompiler: in every iteration all soft weights are
computed by autograd, the block runs in fp32 on 16 images, and Adam with a rate of 1e-4 moves the
scale-aware ``V'``; loss and regularizer are not normalized. Both run on one device in one go, on
the same images, and what they find is compared by a third, plain computation in fp32 on images that
neither has seen.

    python examples/benchmarks/adaround_speed.py --iterations 2500 --limit 400

The block has the width of PixArt (1152, 16 heads, MLP 4608) and random weights: layer norm,
attention, layer norm, MLP. Both sides use the fused attention of PyTorch, where the released code
multiplies matrices that do not fit at 4096 tokens. It prints a table and writes
``results/adaround_speed.json`` beside this file. If the loop would take more than ``--limit``
seconds, it makes fewer iterations, with its schedule over those, and the time is scaled; the report
says so, and its loss is then that of the shorter run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.packing import device_name
from fpcompiler.numerics import quantize
from fpcompiler.numerics.adaround import RoundOptions, SoftWeight, round_unit
from fpcompiler.operand import Operand

GROUP = 128
OPERAND = f"f4E2M1FN@block{GROUP}:f32"
RATE = 1e-4
REGULARIZER = 0.01
TIMED = 3
"""Iterations of the loop that tell how long one takes."""


@dataclass(frozen=True)
class Images:
    """Inputs of the block and what the original block gives, ``[images, tokens, width]``."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return some of them."""
        chosen = torch.tensor(indices, device=self.inputs.device)
        return (self.inputs[chosen],), self.targets[chosen]


@dataclass(frozen=True)
class Block:
    """A transformer block without learned norms: ``qkv``, ``out``, ``fc1``, ``fc2``."""

    heads: int

    def __call__(self, weights: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the output."""
        (x,) = inputs
        qkv, out, fc1, fc2 = weights
        images, tokens, width = x.shape
        shape = (images, tokens, 3, self.heads, width // self.heads)
        normed = functional.layer_norm(x, (width,))
        q, k, v = functional.linear(normed, qkv).view(shape).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + functional.linear(mixed.reshape(x.shape), out)
        hidden = functional.gelu(functional.linear(functional.layer_norm(x, (width,)), fc1))
        return x + functional.linear(hidden, fc2)


class PublishedLoop:
    """FP AdaRound as published: grids of E2M1 in groups, and one loop over iterations."""

    def __init__(self, block: Block, weights: Sequence[Tensor]) -> None:
        self.block = block
        self.parts = [self.prepare(weight) for weight in weights]

    @staticmethod
    def prepare(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight, ``s`` and ``Qmax``, in groups: ``[N, K / 128, 128]``."""
        groups = weight.reshape(weight.shape[0], -1, GROUP)
        largest = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4)
        bias = 2**2 - torch.log2(largest) + math.log2(2 - 2.0**-1) - 1
        power = torch.floor(torch.log2(groups.abs()) + bias).clamp(min=1.0)
        return groups, torch.exp2(power - 1 - bias), largest

    def soft(self, index: int, h: Tensor) -> Tensor:
        """Return a weight whose values are rounded up by ``h``."""
        groups, step, largest = self.parts[index]
        value = step * (torch.floor(groups / step) + h)
        return torch.minimum(torch.maximum(value, -largest), largest).flatten(1)

    def start(self) -> list[Tensor]:
        """Return ``V'`` for which the soft weights are the weights."""
        learned = []
        for groups, step, _ in self.parts:
            rest = groups / step - torch.floor(groups / step)
            learned.append((-step * torch.log(1.2 / (rest + 0.1) - 1)).requires_grad_())
        return learned

    def run(self, images: Images, iterations: int, batch: int) -> list[Tensor]:
        """Return the rounded weights."""
        learned = self.start()
        adam = torch.optim.Adam(learned, lr=RATE)
        for iteration in range(iterations):
            chosen = torch.randperm(len(images))[:batch].tolist()
            inputs, target = images.batch(chosen)
            h = [
                torch.clamp(torch.sigmoid(v / step) * 1.2 - 0.1, 0, 1)
                for v, (_, step, _) in zip(learned, self.parts, strict=True)
            ]
            output = self.block([self.soft(i, own) for i, own in enumerate(h)], inputs)
            loss = (output - target).square().sum(1).mean()
            if iteration >= 0.2 * iterations:
                beta = 20 - 18 * (iteration / iterations - 0.2) / 0.8
                for own in h:
                    loss = loss + REGULARIZER * (1 - (2 * own - 1).abs().pow(beta)).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
        return [self.soft(i, (v >= 0).float()).detach() for i, v in enumerate(learned)]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long work takes by the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def make_problem(
    options: argparse.Namespace, device: torch.device
) -> tuple[Block, list[Tensor], Images, Images]:
    """Return a block, its weights, and images whose channels are correlated and differ in size."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    width, hidden, rank = options.width, options.hidden, max(1, options.width // 4)
    shapes = ((3 * width, width), (width, width), (hidden, width), (width, hidden))
    weights = [normal(*shape) / shape[1] ** 0.5 for shape in shapes]
    mixing, sizes = normal(rank, width) / rank**0.5, torch.exp(0.5 * normal(width))
    block = Block(options.heads)

    @torch.no_grad()
    def images(count: int) -> Images:
        x = torch.stack([
            (normal(options.tokens, rank) @ mixing + 0.3 * normal(options.tokens, width)) * sizes
            for _ in range(count)
        ])  # fmt: skip
        return Images(x, torch.cat([block(weights, (x[i : i + 1],)) for i in range(count)]))

    return block, weights, images(options.images), images(options.held_out)


@torch.no_grad()
def loss_of(block: Block, weights: Sequence[Tensor], images: Images) -> float:
    """Return the mean squared error of the output, added up in fp64."""
    total = 0.0
    for index in range(len(images)):
        inputs, target = images.batch([index])
        total += float((block(weights, inputs) - target).double().square().mean())
    return total / len(images)


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    block, weights, images, held_out = make_problem(options, device)
    operand = Operand.parse(OPERAND)
    settings = RoundOptions(iterations=options.iterations, batch=options.batch)

    def learn(own: RoundOptions) -> list[Tensor]:
        soft = [SoftWeight.of(w, quantize(w, operand)[1], operand) for w in weights]
        result = round_unit(block, soft, images, held_out, own)
        taken.append(result.iterations)
        return [one.values(codes) for one, codes in zip(soft, result.codes, strict=True)]

    taken: list[int] = []
    found: list[list[Tensor]] = []
    learn(RoundOptions(iterations=TIMED, batch=options.batch))  # the first products are slower
    own = seconds(lambda: found.append(learn(settings)), device)
    nearest = [SoftWeight.of(w, quantize(w, operand)[1], operand) for w in weights]
    plain = loss_of(block, [one.values(one.nearest) for one in nearest], held_out)

    loop = PublishedLoop(block, weights)
    batch = min(options.loop_batch, len(images))
    loop.run(images, 1, batch)
    each = seconds(lambda: loop.run(images, TIMED, batch), device) / TIMED
    made = max(1, min(options.iterations, int(options.limit / each)))
    rounded: list[list[Tensor]] = []
    torch.manual_seed(0)
    looped = seconds(lambda: rounded.append(loop.run(images, made, batch)), device)
    losses = [loss_of(block, values, held_out) for values in (found[0], rounded[0])]
    whole = looped * options.iterations / made
    return {
        "own_seconds": own,
        "own_iterations": taken[-1],
        "own_images_in_a_step": settings.batch,
        "own_precision": "bfloat16" if device.type == "cuda" else "fp32",
        "own_loss": losses[0],
        "loop_seconds": whole,
        "loop_iterations_made": made,
        "loop_images_in_a_step": batch,
        "loop_seconds_measured": looped,
        "loop_loss": losses[1],
        "round_to_nearest_loss": plain,
        "own_loss_to_nearest": losses[0] / plain,
        "loop_loss_to_nearest": losses[1] / plain,
        "times_faster": whole / own,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--hidden", type=int, default=4608)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096, help="of an image")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=4, help="images in a step of fpcompiler")
    parser.add_argument("--loop-batch", type=int, default=16, help="images in a step of the loop")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds for the loop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "adaround_speed.json"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    shape = ("width", "hidden", "heads", "tokens", "images", "held_out", "iterations")
    report = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "operand": OPERAND,
        **{name: getattr(options, name) for name in shape},
        "matmul_precision": torch.get_float32_matmul_precision(),
        **measure(options, device),
    }
    for name, value in report.items():
        print(f"{name:26} {value}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
