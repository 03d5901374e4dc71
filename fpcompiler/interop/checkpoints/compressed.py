"""Writing a compressed-tensors checkpoint: a folder that transformers, vLLM and SGLang open."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from fpcompiler.artifact import Artifact, package_versions
from fpcompiler.errors import CheckpointError, ExportError
from fpcompiler.interop.checkpoints.arguments import input_arguments, weight_arguments
from fpcompiler.interop.checkpoints.config import (
    COMPRESSED_TENSORS,
    MODELOPT_CONFIG,
)
from fpcompiler.interop.checkpoints.files import (
    CONFIG,
    INDEX,
    Tensors,
    read_json,
    write_json,
    write_tensors,
)
from fpcompiler.interop.checkpoints.layers import (
    LayerWeight,
    dtype_of,
    kept_layers,
    stored_layers,
)
from fpcompiler.interop.checkpoints.original import require_near
from fpcompiler.interop.checkpoints.reading import (
    RECORD,
    RECORD_VERSION,
    Checkpoint,
    checksum,
    read_checkpoint,
)
from fpcompiler.interop.checkpoints.stored import StoredLayer
from fpcompiler.interop.formats import Exported

_WEIGHT_FILES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_OWN: Final = (CONFIG, INDEX, RECORD, MODELOPT_CONFIG)
_DTYPES: Final = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}


def write(artifact: Artifact, path: Path, *, model: str | Path | None = None) -> Exported:
    """Write a folder with packed weights, and what else there is from the original model's folder.

    The folder appears when it is complete, and has been read again and found to hold the values of
    the artifact.

    Args:
        artifact: A language model, or another model of transformers.
        path: The folder; it must not exist, or be empty.
        model: The folder of the original model: its config, tokenizer, and the tensors that are not
            quantized. A checkpoint that the artifact was imported from will do.

    Raises:
        ExportError: If the format cannot express a layer without loss, or the folder is that of
            another model; the message names the layer and the cause.
        CheckpointError: If the folder of the original cannot be read.
    """
    if model is None:
        raise ExportError(
            "compressed-tensors is a folder of Hugging Face: name that of the original model, for "
            "its config, its tokenizer and the tensors that are not quantized "
            "(--model FOLDER, or model=)."
        )
    _require_free(path)  # Before the work.
    layers = stored_layers(artifact)
    source = _Source(Path(model))
    source.require_same_model(artifact, layers)
    with _new_folder(path) as folder:
        written = _write(folder, artifact, layers, source)
        _require_equal(layers, folder)
    files = tuple(path / file.name for file in written)
    return Exported(files, _facts(layers))


class _Source:
    """The folder of the original model, in high precision or quantized."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ExportError(f"{folder}: there is no such folder of a model.")
        self.folder = folder
        self.config = read_json(folder / CONFIG)
        self.quantized: Checkpoint | None = None
        if "quantization_config" in self.config or (folder / MODELOPT_CONFIG).is_file():
            self.quantized = read_checkpoint(folder)
        self.tensors = Tensors(folder) if self.quantized is None else self.quantized.tensors

    def require_same_model(self, artifact: Artifact, layers: Mapping[str, StoredLayer]) -> None:
        """Check that the folder is that of the model that was compiled."""
        for layer in layers.values():
            if self.quantized is None:
                require_near(layer, self.tensors, self.folder)
            else:
                self._require_equal(layer, self.quantized)
        for key in {*artifact.plan.constants.values()}:
            if key in self.tensors:
                self._require_value(key, artifact.tensors[key])

    def _require_equal(self, layer: StoredLayer, checkpoint: Checkpoint) -> None:
        own = checkpoint.layers.get(layer.name)
        if own is None or not torch.equal(own.codes, layer.codes):
            raise ExportError(
                f"layer {layer.name!r}: {self.folder} is a quantized checkpoint whose codes are "
                "others. Name the folder of the model in high precision."
            )

    def _require_value(self, name: str, value: Tensor) -> None:
        own = self.tensors.read(name)
        if own.shape != value.shape or not torch.equal(own.to(value.dtype), value):
            raise ExportError(
                f"tensor {name!r}: the one in {self.folder} is not that of the compiled model. "
                "Name the folder that was compiled."
            )

    def plain(self, layers: Mapping[str, StoredLayer]) -> Iterator[str]:
        """Yield the names of the tensors that stay as they are."""
        names = self.tensors if self.quantized is None else self.quantized.plain
        replaced = {f"{layer}.weight" for layer in layers}
        return (name for name in names if name not in replaced)


def _write(
    folder: Path, artifact: Artifact, layers: Mapping[str, StoredLayer], source: _Source
) -> list[Path]:
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    if _dtype_of(config) == "float32":
        # compressed-tensors decompresses to bf16, whatever the model is in: in fp32 none can run.
        config["dtype"] = "bfloat16"
        config.pop("torch_dtype", None)
    plain = [*source.plain(layers)]
    config["quantization_config"] = _section(layers, _ignored(artifact, source, plain))
    write_json(folder / CONFIG, config)
    sums: dict[str, str] = {}
    files = write_tensors(folder, _tensors(layers, source, plain, sums))
    record = {
        "fpcompiler": package_versions().get("fpcompiler", "checkout, not installed"),
        "version": RECORD_VERSION,
        "scheme": artifact.scheme,
        "dtype": dtype_of(artifact.plan),
        "weights": {layer.name: str(layer.operand) for layer in layers.values()},
        "inputs": {
            layer.name: str(layer.input.operand) if layer.input else "none"
            for layer in layers.values()
        },
        "sha256": sums,
    }
    write_json(folder / RECORD, record)
    for file in sorted(source.folder.iterdir()):
        if file.is_file() and file.name not in _OWN and file.suffix not in _WEIGHT_FILES:
            shutil.copyfile(file, folder / file.name)
    return [folder / CONFIG, *files, folder / RECORD]


def _tensors(
    layers: Mapping[str, StoredLayer], source: _Source, plain: list[str], sums: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors; note the checksums of those that are ours."""
    for layer in layers.values():
        for part, tensor in parts_of(layer).items():
            sums[f"{layer.name}.{part}"] = checksum(tensor)
            yield f"{layer.name}.{part}", tensor
    for name in plain:
        yield name, source.tensors.read(name)


def _dtype_of(config: Mapping[str, Any]) -> str:
    """Return the dtype that transformers would load a model in; fp32 if nothing is said."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def parts_of(layer: StoredLayer) -> dict[str, Tensor]:
    """Return the tensors of a layer as the format has them, by their names within it."""
    layout = layer.layout
    return {
        layout.codes: layer.codes.contiguous().view(_DTYPES[layout.codes_dtype]),
        "weight_scale": layer.scale.contiguous().view(_DTYPES[layout.scale_dtype]),
        **{part: number.reshape(1) for part, number in layer.numbers.items()},
    }


def _ignored(artifact: Artifact, source: _Source, plain: list[str]) -> list[str]:
    """Return the layers that readers would else expect to be quantized."""
    embeddings = {row.name for row in artifact.plan.layers if row.op == "embedding"}
    weights = (
        name.removesuffix(".weight")
        for name in plain
        if name.endswith(".weight") and len(source.tensors.kinds[name].shape) == 2
    )
    return sorted({*kept_layers(artifact.plan), *weights} - embeddings)


def _section(layers: Mapping[str, StoredLayer], ignore: list[str]) -> dict[str, Any]:
    """Return ``quantization_config``."""
    kinds: dict[tuple[Any, Any], list[str]] = {}
    for layer in layers.values():
        key = (layer.layout.name, layer.input.operand if layer.input else None)
        kinds.setdefault(key, []).append(layer.name)
    groups = {}
    for number, names in enumerate(kinds.values()):
        first = layers[names[0]]
        groups[f"group_{number}"] = {
            # By class if there is one group: some readers know no other targets.
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": weight_arguments(first.layout),
            "input_activations": None if first.input is None else input_arguments(first.input),
            "output_activations": None,
            "format": first.layout.name,
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _require_equal(layers: Mapping[str, StoredLayer], folder: Path) -> None:
    """Read the folder again, and compare values tensor by tensor."""
    try:
        again = read_checkpoint(folder)
    except CheckpointError as error:
        raise ExportError(f"what would be written cannot be read: {error}") from error
    for name, layer in layers.items():
        require_same_values(layer, again.layers[name])


def require_same_values(a: StoredLayer | LayerWeight, b: StoredLayer | LayerWeight) -> None:
    """Check that a layer stands for the same numbers on both sides of a conversion.

    Raises:
        ExportError: If it does not.
    """
    same = torch.equal(a.dequantized(), b.dequantized())
    inputs = [x.input_outer for x in (a, b) if x.input_outer is not None]
    if len(inputs) == 2:
        same = same and float(inputs[0]) == float(inputs[1])
    if not same or len(inputs) == 1:
        raise ExportError(f"layer {a.name!r}: its values would not be the same after conversion.")


def _facts(layers: Mapping[str, StoredLayer]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for layer in layers.values():
        counts[layer.layout.name] = counts.get(layer.layout.name, 0) + 1
    return {"layers": counts, "checked": "read again, all values equal"}


def _require_free(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ExportError(f"{path} exists already; give the name of a new folder.")


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder that takes its name when it is complete, and vanishes otherwise."""
    _require_free(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise ExportError(f"{path} could not be written: {cause}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
