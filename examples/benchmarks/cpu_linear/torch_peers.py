"""Linear layers of PyTorch, and of oneDNN as PyTorch's compiler uses it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from examples.benchmarks.cpu_linear.problem import (
    Builder,
    NotInstalledError,
    Problem,
    Work,
    require_multiple,
)

OPS = torch.ops


def plain(dtype: torch.dtype) -> Builder:
    """Return a builder of ``F.linear``."""

    def build(problem: Problem) -> Work:
        x, weight = problem.x.to(dtype), problem.weight.to(dtype)
        count = problem.copies(weight.nbytes)
        weights = [weight.clone() for _ in range(count)]
        return Work(
            lambda i: functional.linear(x, weights[i]),
            lambda: functional.linear(x, weights[0]).float(),
            weight.nbytes,
            count,
        )

    return build


def onednn_bf16(problem: Problem) -> Work:
    """Build a product with weights in oneDNN's own order, as compiled and frozen models have."""
    if not OPS.mkldnn._is_mkldnn_bf16_supported():
        raise NotInstalledError("this processor has no instructions for bf16")
    x, weight = problem.x.bfloat16(), problem.weight.bfloat16()
    count = problem.copies(weight.nbytes)
    weights = [OPS.mkldnn._reorder_linear_weight(weight.clone(), len(x)) for _ in range(count)]

    def run(i: int) -> Any:
        return OPS.mkldnn._linear_pointwise(x, weights[i], None, "none", [], "")

    return Work(run, lambda: run(0).float(), weight.nbytes, count)


def dynamic_int8(problem: Problem) -> Work:
    """Build a layer with int8 weights that quantizes its input at each call."""
    if "x86" not in torch.backends.quantized.supported_engines:
        raise NotInstalledError("torch has no quantized engine x86 here")
    torch.backends.quantized.engine = "x86"
    n, k = problem.weight.shape
    layer = nn.Linear(k, n, bias=False)
    layer.weight = nn.Parameter(problem.weight, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is deprecated
        quantized = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8
        )
    count = problem.copies(n * k)
    layers = [copy.deepcopy(quantized) for _ in range(count)]
    return Work(lambda i: layers[i](problem.x), lambda: layers[0](problem.x), n * k, count)


def onednn_int8(problem: Problem) -> Work:
    """Build a product of uint8 inputs, quantized beforehand, and int8 weights in oneDNN's order."""
    scale = (problem.weight.abs().amax(1) / 127).contiguous()
    weight = (problem.weight / scale[:, None]).round().to(torch.int8)
    # Signed inputs take a path that is a thousand times slower: they are shifted.
    step, shift = float(problem.x.abs().max()) / 127, 128
    x = ((problem.x / step).round() + shift).to(torch.uint8)
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    count = problem.copies(weight.nbytes)
    shape = list(x.shape)
    weights = [OPS.onednn.qlinear_prepack(weight.clone(), shape) for _ in range(count)]

    def run(i: int) -> Any:
        return OPS.onednn.qlinear_pointwise(
            x, step, shift, weights[i], scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return Work(run, lambda: run(0), weight.nbytes, count)


def aten_int4(problem: Problem, group: int = 128) -> Work:
    """Build ATen's product of bf16 and 4-bit integers with a scale and a minimum for a group."""
    require_multiple("N", len(problem.weight), 16)
    require_multiple("K", problem.weight.shape[1], group)
    groups = problem.weight.view(len(problem.weight), -1, group)
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low) / 15
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    packed = OPS.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).to(torch.int32), 1)
    # A code of 8 stands for the second of the pair.
    pairs = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().bfloat16()
    x, size = problem.x.bfloat16(), packed.nbytes + pairs.nbytes
    count = problem.copies(size)
    weights = [packed.clone() for _ in range(count)]

    def run(i: int) -> Any:
        return OPS.aten._weight_int4pack_mm_for_cpu(x, weights[i], group, pairs)

    return Work(run, lambda: run(0).float(), size, count)
