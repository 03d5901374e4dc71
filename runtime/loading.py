"""``fpcompiler.load``: a compiled model from a file, to run on one of the backends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, overload

import torch

from fpcompiler.artifact import read
from fpcompiler.errors import OptionError
from fpcompiler.runtime.cuda.graphs import GraphOptions
from fpcompiler.runtime.model import CompiledModel

if TYPE_CHECKING:
    from fpcompiler.runtime.onnx_model import OnnxModel

__all__ = ["ONNXRUNTIME", "load"]

ONNXRUNTIME: Final = "onnxruntime"
"""The backend for files of ``export(..., "onnx-portable")``."""


@overload
def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    strict: bool = False,
    trust: bool = False,
    kernels: bool = True,
    graphs: bool | GraphOptions | None = None,
    reproducible: bool = False,
    backend: None = None,
) -> CompiledModel: ...


@overload
def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    backend: Literal["onnxruntime"],
) -> OnnxModel: ...


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    strict: bool = False,
    trust: bool = False,
    kernels: bool = True,
    graphs: bool | GraphOptions | None = None,
    reproducible: bool = False,
    backend: str | None = None,
) -> CompiledModel | OnnxModel:
    """Load a compiled model from a file that :meth:`CompiledModel.save` wrote.

    Neither the class of the model nor any part of the compiler is imported. Weights are mapped from
    the file, so loading takes little memory.

    On a GPU, compiled kernels of the file are used. They are code, so they are loaded only if you
    trust them, or if they were built on this machine; others are built again from the description
    of what they compute, which needs the compiler. No other code from the file runs.

    Args:
        path: The file.
        device: Where to run.
        strict: Whether it is an error if layers that were compiled for kernels (of the target
            ``cpu``, or of this GPU) would run without them: on a machine without the native
            library, say. Otherwise they run more slowly.
        trust: Whether compiled kernels are loaded as they are in the file.
        kernels: Whether compiled kernels are used; without them a GPU runs the reference.
        graphs: Whether the second call with tensors of the same sizes is recorded as a CUDA graph,
            which later ones replay; by default where kernels are used (``FPC_GRAPHS=0``: not even
            there). :class:`~fpcompiler.runtime.cuda.graphs.GraphOptions` says how many are kept.
            ``model.graphs`` tells which calls are replayed, and why others are not.
        reproducible: Whether operators of torch whose last bits differ between machines, sums and
            functions like a cosine, are computed in fp64 and rounded once. Where layers are
            multiplied as integers (schemes of rows and tokens with up to six bits, such as
            ``w4a6-row``), machines with the native library, and Hopper GPUs, then compute the same
            bits; a warning names the first other layer. It is slower, attention above all.
        backend: ``onnxruntime`` for an ONNX file that ``export`` wrote. What comes back is called
            alike and has ``reset``, ``verify`` and ``plan``.

    Raises:
        ArtifactError: If the file is no artifact, or is damaged or from another version, or its
            kernels are not trusted and cannot be built again.
        TargetError: If the file has kernels, but none for this GPU; the message lists them. Or if
            strict, and layers would run without the kernels of their target.
        OptionError: If others can write to the folder of compiled kernels (``FPC_CACHE``), graphs
            are asked for on a device that has none, there is no such backend, it has no such
            option, or a reproducible model has an operator that torch has not in fp64.
        DependencyError: If the backend is not installed.
    """
    if backend == ONNXRUNTIME:
        if strict or trust or not kernels or graphs is not None or reproducible:
            raise OptionError(
                "strict, trust, kernels, graphs and reproducible are for artifacts, and this is an "
                "ONNX file. Leave them out."
            )
        from fpcompiler.runtime.onnx_model import load_onnx

        return load_onnx(path, device)
    if backend is not None:
        raise OptionError(
            f"there is no backend {backend!r}. Leave it out for an artifact, or write "
            f"backend={ONNXRUNTIME!r} for an ONNX file."
        )
    artifact, source = read(path), Path(path).absolute()
    return CompiledModel(
        artifact, device=device, source=source, strict=strict, trust=trust, kernels=kernels,
        graphs=graphs, reproducible=reproducible,
    )  # fmt: skip
