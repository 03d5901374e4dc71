"""The model of a checkpoint with its weights dequantized: what is captured before codes come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fpcompiler.errors import CheckpointError, DependencyError
from fpcompiler.interop.checkpoints.files import CONFIG, read_json
from fpcompiler.interop.checkpoints.reading import Checkpoint


def dense_model(checkpoint: Checkpoint) -> nn.Module:
    """Return the model that a folder's ``config.json`` names, in eval mode.

    Raises:
        CheckpointError: If transformers does not know the model, or its tensors are not those of
            the folder.
        DependencyError: If transformers is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(
            "a Hugging Face folder needs transformers: pip install 'fpcompiler[models]'. Or give "
            "the model itself: import_checkpoint(folder, model=...)."
        ) from error
    settings = read_json(checkpoint.folder / CONFIG)
    architectures = settings.get("architectures") or [None]
    kind = getattr(transformers, str(architectures[0]), None)
    if kind is None:
        raise CheckpointError(
            f"{checkpoint.folder / CONFIG}: transformers has no architecture {architectures[0]!r}."
        )
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # It would make transformers expect codes.
    dtype = _dtype(checkpoint, getattr(config, "dtype", None))
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=dense_state(checkpoint, dtype),
        dtype=dtype,
        output_loading_info=True,
    )
    _require_whole(checkpoint, report)
    result: nn.Module = model.eval()
    return result


def _dtype(checkpoint: Checkpoint, config: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the model: that which was exported, or the one in the config."""
    found = getattr(torch, str(checkpoint.record.get("dtype", "")), config)
    return found if isinstance(found, torch.dtype) else torch.float32


def _require_whole(checkpoint: Checkpoint, report: Any) -> None:
    missing = sorted(map(str, report.get("missing_keys", ())))
    unexpected = sorted(map(str, report.get("unexpected_keys", ())))
    mismatched = sorted(str(item[0]) for item in report.get("mismatched_keys", ()))
    for names, what in ((missing, "is missing"), (mismatched, "has another shape")):
        if names:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {names[0]!r} of the model {what} ({len(names)} do)."
            )
    lost = [name for name in unexpected if name.removesuffix(".weight") in checkpoint.layers]
    if lost:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {lost[0]!r} is quantized, but the model has no such "
            "weight."
        )


def load_dense(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the values of a checkpoint into a model of the user's own, in place.

    Raises:
        CheckpointError: If the tensors are not those of the model.
    """
    own = model.state_dict()
    state = dense_state(checkpoint, None)
    for name, value in state.items():
        if name in own and own[name].shape != value.shape:
            raise CheckpointError(
                f"tensor {name!r}: it is {list(value.shape)}, but in the model it is "
                f"{list(own[name].shape)}."
            )
    found, unexpected = model.load_state_dict(state, strict=False)
    loaded = {own[name].data_ptr() for name in state if name in own}
    # An output head that is tied to the embedding has no tensor of its own.
    missing = [name for name in found if own[name].data_ptr() not in loaded]
    if missing or unexpected:
        first = (missing or unexpected)[0]
        where = "checkpoint" if missing else "model"
        raise CheckpointError(
            f"{checkpoint.folder}: the {where} has no tensor {first!r}: it is that of another "
            "model."
        )


def dense_state(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, those of quantized weights as values.

    Args:
        checkpoint: The checkpoint.
        dtype: Of these; None: fp32.
    """
    state = {name: checkpoint.tensors.read(name) for name in checkpoint.plain}
    for layer in checkpoint.layers.values():
        state[f"{layer.name}.weight"] = layer.dequantized().to(dtype or torch.float32)
    return state


def require_promises_kept(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Check that all layers that the config calls quantized are, by the classes of the model.

    Raises:
        CheckpointError: If one is stored in high precision; readers would look for its codes.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in checkpoint.layers:
            continue
        group = checkpoint.config.group_of(name)
        # An output head that is tied to the embedding has no tensor of its own.
        if group is not None and f"{name}.weight" in checkpoint.tensors:
            raise CheckpointError(
                f"tensor '{name}.weight': {checkpoint.config.source} says that the layer is "
                f"quantized ({group.layout.name}), and does not ignore it, but it is a plain "
                "weight."
            )
