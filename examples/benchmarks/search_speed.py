"""How long the search for formats and clips of one layer takes, against the published loops.

The loops are written here a second time, from LLM-FP4 (arXiv 2310.16836) and the order of its
released code, and share nothing with fpcompiler: in every round, for every format and each of 100
candidates, a tensor is rounded and the whole layer is multiplied. Both run on one device in one
go, and what they find is compared by a third, plain computation of the output error.

    python examples/benchmarks/search_speed.py --rows 4096 --inputs 4096 --tokens 65536

It prints a table and writes ``results/search_speed.json`` beside this file. If the loops would take
more than ``--limit`` seconds, only every n-th candidate is timed and the time scaled; the report
says so, and what they would have found then comes from ``search_layer_faithful``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.packing import device_name
from fpcompiler.numerics.search import (
    FaithfulOptions,
    SearchOptions,
    SearchResult,
    paper_formats,
    search_layer,
    search_layer_faithful,
)

FORMATS = ((3, 0), (2, 1), (1, 2))
"""Exponent and mantissa bits of the 4-bit formats."""
CANDIDATES = 100


def min_max_bias(largest: Tensor, fields: tuple[int, int]) -> Tensor:
    """Eq. 7: the bias with which the format ends at ``largest``."""
    exponent, mantissa = fields
    return 2**exponent - torch.log2(largest) + math.log2(2 - 2.0**-mantissa) - 1


def fake_quantize(x: Tensor, bias: Tensor, fields: tuple[int, int]) -> Tensor:
    """Eq. 2 to 6: clip, find the exponent of each value, round in its step."""
    exponent, mantissa = fields
    largest = (2 - 2.0**-mantissa) * torch.exp2(2**exponent - 1 - bias)
    clipped = torch.minimum(torch.maximum(x, -largest), largest)
    power = torch.floor(torch.log2(clipped.abs()) + bias).clamp(min=1.0)
    step = torch.exp2(power - mantissa - bias)
    return (clipped / step).round_().mul_(step)


@dataclass
class Loops:
    """The search of the released code's FPQ class, for ``y = x @ w.T``.

    Attributes:
        x: ``[T, K]``.
        w: ``[N, K]``.
        stride: 1 to look at all candidates, n for every n-th.
    """

    x: Tensor
    w: Tensor
    stride: int = 1

    def __post_init__(self) -> None:
        self.y = self.x @ self.w.T
        self.w_init = {f: min_max_bias(self.w.abs().amax(1, keepdim=True), f) for f in FORMATS}
        self.x_init = {f: min_max_bias(self.x.abs().amax().view(1, 1), f) for f in FORMATS}
        self.w_best, self.x_best = dict(self.w_init), dict(self.x_init)
        self.w_now = ((2, 1), self.w_init[2, 1])
        self.x_now = ((2, 1), self.x_init[2, 1])

    def gammas(self) -> list[float]:
        """Return the candidates: parts of the bias without a clip."""
        return [0.01 + i * (1.2 - 0.01) / 100 for i in range(0, CANDIDATES, self.stride)]

    def weight(self, fields: tuple[int, int], bias: Tensor) -> Tensor:
        """Return the quantized weight."""
        return fake_quantize(self.w, bias, fields)

    def inputs(self, fields: tuple[int, int], bias: Tensor) -> Tensor:
        """Return the quantized inputs."""
        return fake_quantize(self.x, bias, fields)

    def row_losses(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the mean squared error of each output."""
        return (x @ w.T).sub_(self.y).square_().mean(0)

    def weight_biases(self) -> None:
        """Find the best bias of each row in each format."""
        x = self.inputs(*self.x_now)
        for fields in FORMATS:
            least = torch.full_like(self.w_init[fields][:, 0], torch.inf)
            for gamma in self.gammas():
                bias = gamma * self.w_init[fields]
                losses = self.row_losses(x, self.weight(fields, bias))
                better = losses < least
                least = torch.where(better, losses, least)
                self.w_best[fields] = torch.where(better[:, None], bias, self.w_best[fields])

    def input_biases(self) -> None:
        """Find the best bias of the inputs in each format."""
        w = self.weight(*self.w_now)
        for fields in FORMATS:
            least = torch.inf
            for gamma in self.gammas():
                bias = gamma * self.x_init[fields]
                loss = float(self.row_losses(self.inputs(fields, bias), w).mean())
                if loss < least:
                    least, self.x_best[fields] = loss, bias

    def weight_format(self) -> None:
        """Take the weight format with the least loss."""
        x = self.inputs(*self.x_now)
        losses = {f: self.row_losses(x, self.weight(f, b)).mean() for f, b in self.w_best.items()}
        fields = min(losses, key=lambda f: float(losses[f]))
        self.w_now = (fields, self.w_best[fields])

    def input_format(self) -> None:
        """Take the format of the inputs with the least loss."""
        w = self.weight(*self.w_now)
        losses = {f: self.row_losses(self.inputs(f, b), w).mean() for f, b in self.x_best.items()}
        fields = min(losses, key=lambda f: float(losses[f]))
        self.x_now = (fields, self.x_best[fields])

    def run(self, rounds: int) -> None:
        """Search."""
        for _ in range(rounds):
            self.weight_biases()
            self.input_biases()
            self.weight_format()
            self.input_format()

    def seconds_of_candidates(self) -> float:
        """Return what a candidate of the weight and one of the inputs take together."""
        x, w = self.inputs(*self.x_now), self.weight(*self.w_now)

        def both() -> None:
            self.row_losses(x, self.weight(*self.w_now))
            self.row_losses(self.inputs(*self.x_now), w)

        both()
        return seconds(both, self.x.device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long work takes by the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def make_layer(rows: int, inputs: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs whose channels differ in size, a few by much, and a weight."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    channels = torch.exp(0.5 * normal(inputs))
    channels[:: max(1, inputs // 4)] *= 20.0
    return normal(tokens, inputs) * channels, 0.02 * normal(rows, inputs)


def output_error(
    x: Tensor, w: Tensor, inputs: tuple[tuple[int, int], Tensor], weight: Tensor
) -> float:
    """Return the mean squared output error over all tokens, added up in fp64."""
    total, step = 0.0, 4096
    for start in range(0, len(x), step):
        part = x[start : start + step]
        error = fake_quantize(part, inputs[1], inputs[0]) @ weight.T - part @ w.T
        total += float(error.double().square().sum())
    return total / len(x) / len(w)


def found_error(x: Tensor, w: Tensor, result: SearchResult) -> float:
    """Return :func:`output_error` of what a search of fpcompiler found."""
    sides = []
    for choice in (result.weight, result.activation):
        clip = choice.scale * choice.spec.max
        fields = (choice.spec.exponent_bits, choice.spec.mantissa_bits)
        sides.append((fields, min_max_bias(clip, fields)))
    return output_error(x, w, sides[1], fake_quantize(w, sides[0][1], sides[0][0]))


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    x, w = make_layer(options.rows, options.inputs, options.tokens, device)
    formats = paper_formats(4)
    settings = SearchOptions(rounds=options.rounds)
    small = make_layer(64, 64, 256, device)
    search_layer(*small, formats, formats, options=settings)
    work = partial(search_layer, x, w, formats, formats, options=settings)
    taken = statistics.median(seconds(work, device) for _ in range(3))
    result = work()
    own = found_error(x, w, result)

    loops = Loops(x, w)
    whole = options.rounds * len(FORMATS) * CANDIDATES * loops.seconds_of_candidates()
    loops.stride = max(1, math.ceil(whole / options.limit))
    fraction = len(loops.gammas()) / CANDIDATES
    looped = seconds(lambda: loops.run(options.rounds), device) / fraction
    if loops.stride == 1:
        theirs = output_error(x, w, loops.x_now, loops.weight(*loops.w_now))
    else:
        faithful = FaithfulOptions(rounds=options.rounds)
        theirs = found_error(x, w, search_layer_faithful(x, w, formats, formats, options=faithful))
    return {
        "search_seconds": taken,
        "search_rounds_made": result.rounds,
        "search_formats": [result.weight.spec.name, result.activation.spec.name],
        "search_loss": own,
        "loops_seconds": looped,
        "loops_fraction_of_candidates_timed": fraction,
        "loops_loss": theirs,
        "loops_loss_from": "the loops" if loops.stride == 1 else "search_layer_faithful",
        "round_to_nearest_loss": result.rtn_loss,
        "times_faster": looped / taken,
        "loss_ratio": own / theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4096, help="outputs of the layer")
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for the loops")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "search_speed.json"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    report = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": options.rows,
        "inputs": options.inputs,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "matmul_precision": torch.get_float32_matmul_precision(),
        **measure(options, device),
    }
    for name, value in report.items():
        print(f"{name:36} {value}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
