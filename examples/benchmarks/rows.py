"""Which methods are measured with which schemes, and which of the results the README shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Rows = Mapping[str, Sequence[str]]
"""Methods by scheme."""

PAPER = "w=f4E2M1FN@row:f32,a=f4E2M1FN@tensor:f32"
"""LLM-FP4's own setting, 4/4/4: weights per row, inputs with one static scale."""

TOKEN = "w=f4E2M1FN@row:f32/block32:f8E8M0FNU,a=f6E2M3FN@token:f32/block32:f8E8M0FNU"
"""w4a6 with a real scale for each token above those of its blocks."""

MEASURED: Rows = {
    "w4a16": ("rtn", "mse", "search", "gptq", "rotate-gptq"),
    "w4a8": ("rtn", "mse", "search", "rotate-gptq"),
    "w4a6": ("rtn", "mse", "search", "search-adaround-layers", "rotate-gptq"),
    TOKEN: ("rtn", "rotate-gptq"),
    "w4a6-row": (
        "rtn", "mse", "search", "preshift", "search-preshift", "preshift-gptq",
        "rotate-gptq",
    ),
    "w4a4": ("rtn", "mse", "search", "rotate", "search-adaround-layers", "rotate-gptq"),
    "nvfp4": ("rtn", "search", "rotate-gptq"),
    "mxfp4": ("rtn", "search", "rotate-gptq"),
    PAPER: (
        "rtn", "mse", "faithful", "search", "search-fisher", "preshift", "search-preshift",
        "search-preshift-gptq",
    ),
}  # fmt: skip

SHOWN: Rows = {
    scheme: [
        m
        for m in methods
        if m in ("rtn", "search", "search-adaround-layers", "gptq", "rotate-gptq")
    ]
    for scheme, methods in MEASURED.items()
    if scheme != PAPER
}
"""What the README shows beside the paper's setting."""
