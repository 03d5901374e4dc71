"""All rows of the benchmark."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib import metadata

import torch

from examples.benchmarks.cpu_linear.ggml import ggml, ggml_product
from examples.benchmarks.cpu_linear.ours import int8_peak, quantized, read
from examples.benchmarks.cpu_linear.problem import NotInstalledError, Peer
from examples.benchmarks.cpu_linear.runtimes import (
    onnxruntime_int4,
    openvino_f4e2m1,
    openvino_int4,
)
from examples.benchmarks.cpu_linear.torch_peers import (
    aten_int4,
    dynamic_int8,
    onednn_bf16,
    onednn_int8,
    plain,
)

FLOAT, INT8, FOUR_BITS = 0.01, 0.03, 0.25
"""Limits of the relative error: far above what rounding of normal values gives, far below 1."""

SCHEMES = ("w4a6", "w4a6-row", "nvfp4", "w4a8", "w4a16")

_GIVEN = "inputs are quantized beforehand, outside of the time"
_FP32 = "fp32 in and out"
_GRAPH = "fp32 in and out; one call multiplies with all copies"

CEILINGS = (
    Peer("read", "plain read of N*K/2 bytes", 0, read, "", "the 4-bit codes without scales"),
    Peer("int8-peak", "int8 peak", 0, int8_peak, "", "as many operations, without memory"),
)
"""What no kernel on this machine can be faster than."""

PEERS = (
    Peer("torch-bf16", "torch bf16", FLOAT, plain(torch.bfloat16)),
    Peer("torch-fp32", "torch fp32", FLOAT, plain(torch.float32)),
    Peer("torch-int8", "torch dynamic int8", INT8, dynamic_int8, note=_FP32),
    Peer("onednn-bf16", "oneDNN bf16 prepacked", FLOAT, onednn_bf16),
    Peer("onednn-int8", "oneDNN int8 prepacked", INT8, onednn_int8, note=f"{_GIVEN}; fp32 out"),
    Peer("aten-int4", "ATen int4pack, group 128", FOUR_BITS, aten_int4),
    Peer(
        "ort-int4-b32", "onnxruntime int4, block 32", FOUR_BITS, onnxruntime_int4(32),
        "onnxruntime", _GRAPH,
    ),
    Peer(
        "ort-int4-b128", "onnxruntime int4, block 128", FOUR_BITS, onnxruntime_int4(128),
        "onnxruntime", _GRAPH,
    ),
    Peer(
        "ggml-mxfp4", "llama.cpp MXFP4", FOUR_BITS, ggml_product("mxfp4"),
        "llama_cpp_python", _GRAPH,
    ),
    Peer(
        "ggml-q4_0", "llama.cpp Q4_0", FOUR_BITS, ggml_product("q4_0"),
        "llama_cpp_python", _GRAPH,
    ),
    Peer(
        "openvino-int4", "OpenVINO int4, block 32", FOUR_BITS, openvino_int4, "openvino", _GRAPH
    ),
    Peer(
        "openvino-f4e2m1", "OpenVINO f4e2m1, block 32", FOUR_BITS, openvino_f4e2m1,
        "openvino", _GRAPH,
    ),
)  # fmt: skip
"""What fpcompiler is compared with. Their int4 rows have 4-bit weights and their own scales."""

BASELINE = "torch-bf16"
"""The peer that the tables divide by."""

FOUR_BIT_PEERS = tuple(peer.name for peer in PEERS if peer.limit == FOUR_BITS)


def schemes(names: Sequence[str], kernel: str) -> tuple[Peer, ...]:
    """Return the rows of fpcompiler.

    Raises:
        FormatError: If there is no such scheme.
    """
    note = "" if kernel == "native" else f"kernel: {kernel}"
    return tuple(
        Peer(name, f"fpcompiler {name}", FOUR_BITS, quantized(name, kernel), "", note)
        for name in names
    )


def versions() -> dict[str, str]:
    """Return the versions of what is installed of the peers."""
    found = {}
    for package in sorted({peer.package for peer in PEERS}):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    with contextlib.suppress(NotInstalledError):
        found["ggml"] = ggml().base.ggml_version().decode()
    return found
