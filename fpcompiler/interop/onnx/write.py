"""Writes ONNX files: the formats ``onnx-standard`` and ``onnx-portable``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fpcompiler.artifact import Artifact
from fpcompiler.interop.formats import Exported
def build(artifact: Artifact, style: str, highest=28):
    from fpcompiler.interop.onnx.trace import trace_onnx
    from fpcompiler.interop.onnx.lower import lower
    from fpcompiler.interop.onnx.portable import Portable
    from fpcompiler.interop.onnx.standard import Standard
    model = trace_onnx(artifact)
    w = lower(model, Portable() if style=="portable" else Standard(highest))
    return model, w
