"""``fpcompiler.import_checkpoint`` and ``fpcompiler.convert``: quantized checkpoints in and out."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fpcompiler.arguments import PATH, require_type
from fpcompiler.artifact import read, save
from fpcompiler.dumps import Dumps
from fpcompiler.errors import ExportError, OptionError
from fpcompiler.huggingface import without_bars
from fpcompiler.interop.checkpoints.compressed import require_same_values
from fpcompiler.interop.checkpoints.dense import dense_model, load_dense, require_promises_kept
from fpcompiler.interop.checkpoints.files import Tensors
from fpcompiler.interop.checkpoints.layers import (
    CHECKPOINT,
    LayerWeight,
    fused_groups,
    layer_weights,
    record_of,
)
from fpcompiler.interop.checkpoints.original import require_near
from fpcompiler.interop.checkpoints.reading import Checkpoint, read_checkpoint
from fpcompiler.interop.checkpoints.stored import StoredLayer
from fpcompiler.interop.formats import export
from fpcompiler.job import Job, Progress, Targets, default_progress, example_call
from fpcompiler.operand import Operand
from fpcompiler.runtime.model import CompiledModel

if TYPE_CHECKING:
    from fpcompiler.passes import StoredWeight
    from fpcompiler.scheme import Scheme

_NONE = type(None)

Layers = Mapping[str, StoredLayer] | Mapping[str, LayerWeight]
"""Quantized layers by name, of a checkpoint or of an artifact."""


def import_checkpoint(
    folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    original: str | os.PathLike[str] | None = None,
    weights_only: bool = False,
    check_values: bool = True,
    target: str = "cpu",
    dynamic: Any = "auto",
    dump_dir: str | os.PathLike[str] | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> CompiledModel:
    """Compile a model that another tool has quantized, with the codes and scales of its checkpoint.

    Nothing is quantized again: codes and scales of weights are those of the file, bit for bit (but
    E4M3 scales of zero, whose blocks are zeros, become the smallest one). Inputs are quantized as
    the config says; where it leaves the rounding of MX scales open, by the rule of OCP MX.

    Args:
        folder: A compressed-tensors checkpoint (NVFP4, MXFP4, MXFP6, MXFP8) or one of NVIDIA's
            Model Optimizer (NVFP4).
        model: The model, if it is not one of transformers that ``config.json`` names; the values of
            the checkpoint are loaded into it.
        example_inputs: Positional arguments of an example call; a model of transformers needs none.
        example_kwargs: Keyword arguments of it.
        original: The folder of the model before it was quantized. Each weight is compared with it,
            which alone shows nibbles that are swapped.
        weights_only: Leave inputs in high precision, whatever the config says.
        check_values: Whether weights that no model has are refused, such as with scales that are
            reciprocals.
        target: What it runs on, see ``fpcompiler targets``.
        dynamic: Which sizes may vary, see :func:`fpcompiler.compile`.
        dump_dir: A folder that gets the program after each pass.
        strict: Whether it is an error if a layer would run here without the kernels of the target.
        progress: Wraps an iterable of long work for a progress bar.

    Raises:
        CheckpointError: If the checkpoint is damaged, contradicts itself or the model, or is of a
            format that cannot be read; the message names the tensor and the cause.
        PassError: If the model does not multiply a weight as it is stored.
        CaptureError: If torch.export cannot turn the model into a graph.
    """
    from fpcompiler.codegen.targets import split_targets

    require_type("model", model, (nn.Module, _NONE), "a module")
    require_type("target", target, (str,), "the name of a target, such as 'cpu'")
    require_type("original", original, (*PATH, _NONE), "the folder of the original model")
    plan_target, archs = split_targets(target)
    checkpoint = read_checkpoint(folder, check_values=check_values)
    if original is not None:
        tensors = Tensors(Path(original))
        for layer in checkpoint.layers.values():
            require_near(layer, tensors, Path(original))
    for note in (*checkpoint.notes, *_fused_notes(checkpoint)):
        warnings.warn(f"{checkpoint.folder}: {note}.", stacklevel=2)
    own = model is not None
    if model is None:
        with without_bars():
            model = dense_model(checkpoint)
    else:
        load_dense(model, checkpoint)
    require_promises_kept(model, checkpoint)
    scheme = _scheme(model, checkpoint, weights_only)
    job = _job(model, scheme, Targets(plan_target, archs), checkpoint, dump_dir, dynamic, progress)
    call = example_call(example_inputs, example_kwargs, None)
    if call is None and own:
        return CompiledModel.deferred(
            job.build, scheme=str(scheme), dumps=job.dumps.folder, strict=strict
        )
    args, kwargs = call or ((), _example(model))
    return CompiledModel(job.build(args, kwargs), dumps=job.dumps.folder, strict=strict)


def _example(model: nn.Module) -> dict[str, Tensor]:
    from fpcompiler.huggingface import example_call as example

    return example(model)


def _job(
    model: nn.Module,
    scheme: Scheme,
    targets: Targets,
    checkpoint: Checkpoint,
    dump_dir: str | os.PathLike[str] | None,
    dynamic: Any,
    progress: Progress | None,
) -> Job:
    from fpcompiler.passes import import_pipeline

    stored = {layer.name: _stored(layer) for layer in checkpoint.layers.values()}
    formats = sorted({layer.layout.name for layer in checkpoint.layers.values()})
    chosen = {
        CHECKPOINT: {
            "method": checkpoint.config.method,
            "formats": formats,
            **record_of(checkpoint.layers),
        }
    }
    return Job(
        model,
        scheme,
        targets,
        dynamic,
        import_pipeline(str(scheme), targets.plan),
        Dumps.of(dump_dir, weights=False),
        progress or default_progress(),
        None,
        chosen,
        stored,
    )


def _stored(layer: StoredLayer) -> StoredWeight:
    from fpcompiler.passes import StoredWeight

    return StoredWeight(layer.codes, layer.scales, layer.input_outer)


def _scheme(model: nn.Module, checkpoint: Checkpoint, weights_only: bool) -> Scheme:
    """Return the scheme that quantizes exactly the layers of the checkpoint."""
    from fpcompiler.scheme import LayerScheme, Rule
    from fpcompiler.scheme import Scheme as SchemeClass

    inputs = checkpoint.record.get("inputs", {})
    kinds = {
        layer.name: LayerScheme(
            layer.operand, None if weights_only else _input_of(layer, inputs.get(layer.name))
        )
        for layer in checkpoint.layers.values()
    }
    modules = dict(model.named_modules())
    base = Counter(kinds.values()).most_common(1)[0][0]
    rules = [Rule(_exact(name, modules), kind) for name, kind in kinds.items() if kind != base]
    kept = [name for name in modules if name not in kinds and hasattr(modules[name], "weight")]
    linear = [name for name in kept if _multiplies(modules[name])]
    return SchemeClass(base, tuple(_exact(name, modules) for name in linear), tuple(rules))


def _multiplies(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim > 1 and not isinstance(module, nn.Embedding)


def _exact(name: str, names: Iterable[str]) -> str:
    """Return a pattern for one layer alone: a name without dots matches others that end in it."""
    alone = "." in name or not any(other.endswith(f".{name}") for other in names)
    return name if alone and not set(name) & set("*?[") else f"re:{re.escape(name)}"


def _input_of(layer: StoredLayer, text: str | None) -> Operand | None:
    if text is None:
        return layer.input.operand if layer.input else None
    return None if text == "none" else Operand.parse(text)


def _fused_notes(checkpoint: Checkpoint) -> Sequence[str]:
    """Return a note if layers that servers run as one have scales of their own."""
    for group in fused_groups(checkpoint.layers):
        layers = [checkpoint.layers[name] for name in group]
        scales = {float(layer.outer) for layer in layers if layer.outer is not None}
        if len(scales) > 1:
            return (
                f"{', '.join(group)} have different scales of the tensor; vLLM would take the "
                "largest for all of them, here each keeps its own",
            )
    return ()


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        path: What was written.
        layers: Quantized layers; the values of all were compared on both sides, and are equal.
        bytes: Of their codes and scales.
    """

    path: Path
    layers: int
    bytes: int


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    check_values: bool = True,
) -> Converted:
    """Turn an artifact into a checkpoint, or a checkpoint into an artifact, without loss.

    The values of every quantized layer are decoded on both sides and compared.

    Args:
        source: An artifact (a file), or the folder of a checkpoint.
        target: An artifact if the name ends in ``.fpc``, else the folder of a compressed-tensors
            checkpoint.
        model: To write a checkpoint: the folder of the original model; by default the source, if
            that is a checkpoint.
        check_values: See :func:`import_checkpoint`.

    Raises:
        ExportError: If something would be lost; the message names the layer and the cause.
        CheckpointError: If a checkpoint cannot be read.
        ArtifactError: If the artifact cannot be read or written.
        OptionError: If a path is none, or nothing is known of what it names.
    """
    require_type("the source", source, PATH, "that of an artifact or the folder of a checkpoint")
    require_type("the target", target, PATH, "that of an artifact or a new folder")
    start, end = Path(source), Path(target)
    if end.suffix in (".onnx", ".pt2"):
        raise OptionError(
            f"{end}: what convert writes is read again and compared, and no {end.suffix} file "
            "is read here. Use fpcompiler export."
        )
    if start.is_dir():
        artifact = import_checkpoint(start, check_values=check_values).artifact
        before: Layers = read_checkpoint(start, check_values=check_values).layers
    else:
        artifact = read(start)
        before = layer_weights(artifact)
    if end.suffix == ".fpc":
        save(end, artifact)
        after: Layers = layer_weights(read(end))
    else:
        export(
            artifact, end, "compressed-tensors", model=model or (start if start.is_dir() else None)
        )
        after = read_checkpoint(end, check_values=check_values).layers
    _require_same(before, after)
    size = sum(layer.codes.nbytes + layer.scales[-1].nbytes for layer in after.values())
    return Converted(end, len(after), size)


def _require_same(before: Layers, after: Layers) -> None:
    if before.keys() != after.keys():
        name = sorted(before.keys() ^ after.keys())[0]
        raise ExportError(f"layer {name!r}: it is quantized on one side of the conversion only.")
    for name, layer in before.items():
        require_same_values(layer, after[name])
