"""The quantized weights of an ONNX file, as numbers: what a reader of the file makes of its bytes.

The constants are read by onnx's own code, types of few bits included. The property of the file says
which constant belongs to which layer; the tables of the portable style are in the file too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from google.protobuf.message import DecodeError

from fpcompiler.errors import ArtifactError, first_line
from fpcompiler.interop.onnx.lower import Lowered
from fpcompiler.operand import Operand
from fpcompiler.runtime.onnx_model import METADATA, METADATA_VERSION, OnnxFacts

__all__ = ["OnnxWeight", "read_facts", "read_weights"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class OnnxWeight:
    """A quantized weight of a file.

    Attributes:
        operand: What it was quantized to.
        values: Elements times all scales, fp32 ``[N, K]``; outermost scales first.
    """

    operand: Operand
    values: Array


def read_weights(path: Path) -> dict[str, OnnxWeight]:
    """Return the quantized weights of a file that ``export`` wrote, by layer.

    Raises:
        ArtifactError: If the file is none of ours.
    """
    model = ir.load(path)
    text = model.metadata_props.get(METADATA)
    facts = json.loads(text) if text else {}
    if facts.get("version") != METADATA_VERSION:
        raise ArtifactError(
            f"{path} does not say what its weights are: it has no property {METADATA!r} of version "
            f"{METADATA_VERSION}. Write it with `fpcompiler export`."
        )
    rows = [Lowered(**row) for row in facts["weights"]]
    constants = model.graph.initializers
    return {row.layer: _weight(row, constants) for row in rows}


def read_facts(path: Path) -> OnnxFacts:
    """Return what a file that ``export`` wrote says of itself.

    Raises:
        ArtifactError: If there is no such file, or it is none of ours.
    """
    try:
        properties = ir.load(path).metadata_props
    except (OSError, DecodeError) as error:
        raise ArtifactError(f"{path} cannot be read as ONNX: {first_line(error)}.") from error
    if METADATA not in properties:
        raise ArtifactError(
            f"{path} says nothing of layers: it has no property {METADATA!r}. Write it with "
            "`fpcompiler export`."
        )
    return OnnxFacts.from_json(properties[METADATA], path)


def _weight(row: Lowered, constants: Mapping[str, ir.Value]) -> OnnxWeight:
    operand = Operand.parse(row.operand)
    values = _elements(row, operand, constants)
    total = _constant(constants, row.outer_scale)[:, None] if row.outer_scale else None
    if operand.block:
        blocks = _factors(constants, row.block_scale, operand)
        width = operand.block.block
        wide = np.repeat(blocks, width, axis=1)[:, : row.k]
        total = wide if total is None else total * wide
    return OnnxWeight(operand, values if total is None else values * total)


def _elements(row: Lowered, operand: Operand, constants: Mapping[str, ir.Value]) -> Array:
    """Return the element of each code, ``[N, K]``."""
    codes = _constant(constants, row.codes)
    if codes.dtype != np.uint8:
        # Integers count the smallest number of the format; scales of blocks have that in them.
        whole = codes.dtype in _INTEGERS and operand.block is None
        step = np.float32(operand.format.smallest if whole else 1.0)
        return codes.astype(np.float32) * step
    name = operand.format.name
    if operand.format.storage_bits == _PACKED_BITS:
        table = _constant(constants, f"fpc.{name}.pairs")
        return table[codes].reshape(len(codes), -1)[:, : row.k]
    return _constant(constants, f"fpc.{name}.values")[codes][:, : row.k]


_PACKED_BITS: Final = 4
_INTEGERS: Final = (ml_dtypes.int4, np.int8, np.int16)


def _factors(constants: Mapping[str, ir.Value], name: str, operand: Operand) -> Array:
    scales = _constant(constants, name)
    if scales.dtype != np.uint8:
        return scales.astype(np.float32)
    assert operand.block is not None
    return _constant(constants, f"fpc.{operand.block.format}.values")[scales]


def _constant(constants: Mapping[str, ir.Value], name: str) -> Array:
    value = constants[name].const_value
    assert value is not None
    return value.numpy()
