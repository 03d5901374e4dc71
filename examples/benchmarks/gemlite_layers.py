"""Layers of GemLite (Triton, Apache 2.0), to stand beside ours: 4-bit MX weights on any GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor, nn

from examples.benchmarks.cuda_graphs import Launch

KINDS: Final = {"gemlite a16w4": "A16W4_MXFP", "gemlite a8w4": "A8W4_MXFP_dynamic"}
"""What stands in a record, and GemLite's name: bf16 activations, and FP8 ones made at each call."""


def installed() -> bool:
    """Return whether there is a gemlite."""
    return importlib.util.find_spec("gemlite") is not None


def layers_of(kind: str, weights: Sequence[Tensor]) -> list[Any]:
    """Return layers with the weights, quantized by GemLite.

    Args:
        kind: A key of :data:`KINDS`.
        weights: bf16 ``[N, K]`` on the GPU; they stay as they are.
    """
    from gemlite import helper

    make = getattr(helper, KINDS[kind])
    found = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        quantizer = make(device=str(weight.device), dtype=weight.dtype)
        found.append(quantizer.from_linear(layer, del_orig=False))
    return found


def calls_of(layers: Sequence[Any], x: Tensor) -> list[Launch]:
    """Return a call for each layer; the first one tunes its kernels, which takes seconds."""
    return [lambda layer=layer: layer(x) for layer in layers]
